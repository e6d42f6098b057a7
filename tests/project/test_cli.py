"""The command line: what it prints, its exit codes, and the demo in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import dcnv4
from dcnv4 import backends
from dcnv4.__main__ import main
from dcnv4.cli import info


@pytest.fixture
def clean(monkeypatch):
    for name in backends.environment():
        monkeypatch.delenv(name)


def block(monkeypatch, *modules):
    for module in modules:
        for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)


def test_info_tells_versions_and_every_backend(capsys, clean):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"dcnv4 {dcnv4.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    )
    assert "environment: nothing set" in lines
    assert f"cache: {backends.cache_dir()}" in lines
    cpu = lines[next(i for i, line in enumerate(lines) if line.startswith("cpu: ")) :]
    assert [line.split()[0] for line in cpu if line.startswith("  ") and line[2] != " "][:4] == [
        *backends.NAMES
    ]
    assert "  reference  usable" in cpu


def test_info_json_agrees_with_the_backends(capsys, clean):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"][0]["device"] == "cpu"
    device = facts["devices"][0]
    for op in ("deform_conv", "ms_deform_attn"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            text, call = f"{op} {str(dtype)[6:]}", backends.Call(op, torch.device("cpu"), dtype)
            assert device["auto"][text] == backends.choose(*call, "auto")
            for name in backends.NAMES:
                assert device["backends"][name][text] == backends.why_not(name, call)


def test_info_without_optional_packages():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('triton', 'cuda', 'ninja', 'numpy')));"
    code = f"{blocked} from dcnv4.__main__ import main; sys.exit(main(['info', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["devices"][0]["backends"]
    assert report["reference"]["deform_conv float32"] is None
    assert isinstance(report["triton"]["deform_conv float32"], str)


def test_info_survives_a_broken_backend_and_a_wrong_variable(capsys, monkeypatch):
    def broken(name):
        raise OSError("libsomething.so: not found\nmore")

    monkeypatch.setattr(backends, "load", broken)
    monkeypatch.setenv("DCNV4_BACKEND", "gpu")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "OSError: libsomething.so: not found\n" in out
    assert "environment: DCNV4_BACKEND=gpu" in out
    assert "DCNV4_BACKEND must be one of auto, cuda, triton, cpu, reference; got 'gpu'" in out


def test_info_names_the_calls_where_answers_differ(capsys, monkeypatch, clean):
    def why_not(name, call):
        if name == "cpu" and call.dtype == torch.float16:
            return "needs no half"
        if name == "triton" and call.op == "ms_deform_attn" and call.dtype == torch.float64:
            return "needs less"
        return None

    monkeypatch.setattr(backends, "why_not", why_not)
    lines = info.describe(info.collect()).splitlines()
    assert "  cpu        float64, float32, bfloat16: usable" in lines
    assert "             float16: needs no half" in lines
    assert "             ms_deform_attn float64: needs less" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["info", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "usage: dcnv4" in err
    assert message in err


def test_help_spells_names_as_they_are(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "on the CPU" in capsys.readouterr().out


def test_alone_it_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("info", "demo", "bench"))


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dcnv4", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"dcnv4 {dcnv4.__version__}\n")


def test_info_into_a_closed_pipe():
    command = [sys.executable, "-m", "dcnv4", "info"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("command", ["info", "demo", "bench"])
def test_every_command_has_its_two_functions(command):
    module = import_module(f"dcnv4.cli.{command}")
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_interrupted(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


def test_demo_names_missing_packages(capsys, monkeypatch, tmp_path):
    block(monkeypatch, "matplotlib", "sklearn")
    assert main(["demo", "--output", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dcnv4 demo needs matplotlib, ")
    assert "scikit-learn" in err
    assert 'pip install ".[demo]"' in err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo():
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    return import_module("dcnv4.cli.demo")


@pytest.fixture(scope="module")
def few(demo):
    digits = demo.load(seed=0, test=100)
    return digits._replace(images=digits.images[:64], labels=digits.labels[:64])


def test_demo_refuses_a_file_as_folder(demo, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


def test_demo_in_small(demo, few, one_thread, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load", lambda seed: few)
    assert main(["demo", "--epochs", "1", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "DCNv4Conv2d" in out
    assert "nn.Conv2d" in out
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_repeats_by_seed(demo, few, one_thread):
    runs = [demo.train("DCNv4Conv2d", few, 1, seed) for seed in (3, 3, 4)]
    first, again, other = (next(run.model[3].parameters()) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_demo_tests_on_other_digits_than_it_learns(demo):
    digits = demo.load(seed=0)
    assert (len(digits.labels), len(digits.test_labels)) == (1397, 400)
    assert sorted(digits.test_labels.unique().tolist()) == list(range(10))
    assert torch.equal(digits.test_images, demo.load(seed=0).test_images)


def test_demo_networks_have_about_as_many_parameters(demo):
    sizes = [
        sum(p.numel() for p in demo.network(*layer).parameters()) for layer in demo.LAYERS.values()
    ]
    assert max(sizes) < 1.05 * min(sizes)


def test_a_drawn_digit_stays_on_the_canvas(demo):
    canvases = demo.draw(torch.ones(200, 1, 8, 8), torch.Generator().manual_seed(0))
    assert canvases.shape == (200, 1, 28, 28)
    # A square of side s, turned: s^2 pixels, its corners at most cut off by the edge.
    areas = canvases.sum((1, 2, 3))
    assert areas.min() > 0.85 * 12**2
    assert areas.max() < 1.05 * 20**2


def test_demo_looks_at_the_digit(demo, few):
    model = demo.network(*demo.LAYERS["DCNv4Conv2d"])
    canvas = torch.zeros(1, 1, 28, 28)
    canvas[0, 0, 11:14, 19:22] = 1
    centers, positions, weights = demo.look(model, canvas)
    assert centers.tolist() == [[20, 12]]
    # Untrained, the points of a group are the 3 x 3 kernel grid around that pixel, 4 pixels apart.
    assert positions.shape == (1, 4, 9, 2)
    assert positions[0, 0].tolist() == [[x, y] for x in (16, 20, 24) for y in (8, 12, 16)]
    assert weights.shape == (1, 4, 9)
