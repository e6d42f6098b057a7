"""Other libraries' models on this package's operators; only calls need those libraries."""
