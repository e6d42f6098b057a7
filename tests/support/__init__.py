"""What tests share: cases, the oracle, the emulated GPU."""
