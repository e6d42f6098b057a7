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
    # What is chosen so is not to be remembered.
    monkeypatch.setattr(backends, "_choose", backends._choose.__wrapped__)
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
    missing, _, command = err.partition(": pip install ")
    assert missing.startswith("dcnv4 demo needs matplotlib, ")
    assert {"matplotlib", "scikit-learn"} <= set(command.split())
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
def photos(demo):
    return demo.load(test=8)


@pytest.fixture
def short(demo, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 10)


@pytest.mark.parametrize("given", ["two", "0", "-1", "1.5"])
def test_demo_takes_whole_epochs(given, demo, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--epochs", given])
    assert stop.value.code == 2
    assert f"argument --epochs: must be an integer >= 1; got {given}" in capsys.readouterr().err


def test_demo_refuses_a_file_as_folder(demo, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread", "short")
def test_demo_in_small(demo, photos, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load", lambda: photos)
    assert main(["demo", "--epochs", "2", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in (demo.OURS, demo.BEST):
        (row,) = (line.split() for line in out.splitlines() if line.startswith(f"{name}  "))
        assert float(row[-4]) > 0  # error, parameters, seconds, "s"
    assert "as the lens shows it" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_thread", "short")
def test_demo_compares(demo, photos, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load", lambda: photos)
    monkeypatch.setattr(demo, "convolutions", lambda: {"small": demo.as_large(plain, 8564)})
    words = ["--epochs", "1", "--compare", "2", "--output", str(tmp_path)]
    assert main(["demo", *words]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["| `DCNv4Conv2d`", "| `small`"]
    for *_, errors, each in rows[2:]:
        first, second = (float(error.strip(" |")) for error in each.split(","))
        middle, deviation = (float(number) for number in errors.split(" ± "))
        assert middle == pytest.approx((first + second) / 2, abs=0.11)
        assert deviation == pytest.approx(abs(first - second) / 2**0.5, abs=0.11)


def plain(i, o):
    return torch.nn.Conv2d(i, o, 3, padding=1)


@pytest.mark.usefixtures("one_thread", "short")
def test_demo_repeats_by_seed(demo, photos):
    runs = [demo.train(demo.OURS, demo.DEFORMABLE, photos, 1, seed) for seed in (3, 3, 4)]
    first, again, other = (next(run.model[3].parameters()) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_demo_networks_have_about_as_many_parameters(demo):
    contestants = {demo.OURS: demo.DEFORMABLE, **demo.convolutions()}
    assert len(contestants) == 10
    assert demo.BEST in contestants
    models = {name: demo.network(*contestant) for name, contestant in contestants.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert max(sizes.values()) < 1.05 * min(sizes.values())
    for name, model in models.items():
        assert model(torch.zeros(1, 7, 64, 64)).shape == (1, 3, 64, 64), name


def test_demo_lens(demo):
    """A straight line through the middle stays, others bend; corners stay where they are."""
    x = torch.linspace(-1 + 1 / 64, 1 - 1 / 64, 64)
    scenes = torch.stack((x.expand(64, 64), x[:, None].expand(64, 64), torch.ones(64, 64)))[None]
    seen = demo.through_lens(scenes)
    assert seen.shape == (1, 7, 64, 64)
    across, down, x, y = seen[0, [0, 1, 3, 4]].double()
    square = x**2 + y**2
    inside = slice(2, -2)
    for shown, place in ((across, x), (down, y)):
        expected = place * (1 + demo.BEND * square) / (1 + 2 * demo.BEND)
        torch.testing.assert_close(
            shown[inside, inside], expected[inside, inside], atol=1e-4, rtol=0
        )
    torch.testing.assert_close(seen[0, 5:].double(), torch.stack((x, y)) * square)


def test_demo_varies_colours_and_sides(demo, photos):
    generator = torch.Generator().manual_seed(0)
    scenes = demo.parts(photos.photos, 64, generator)
    other = demo.varied(scenes, generator)
    assert other.shape == scenes.shape == (64, 3, 64, 64)
    assert other.min() >= 0
    assert other.max() <= 1
    assert (other - scenes).abs().amax((1, 2, 3)).min() > 0.01


def test_demo_looks_where_its_layers_do(demo, photos):
    model = demo.network(*demo.DEFORMABLE)
    pixels, places = demo.look(model, photos.test_inputs[:1])
    assert pixels.shape == (36, 2)
    assert pixels[[0, 1, 6]].tolist() == [[6.5, 6.5], [16.5, 6.5], [6.5, 16.5]]
    torch.testing.assert_close(places, pixels)  # a new layer's points lie evenly around a pixel
    with torch.no_grad():
        for layer in (model[1], model[3]):
            offsets, _ = layer.window.split(layer.offset_mask.bias)
            offsets.copy_(torch.tensor([1.0, -0.5]))
    _, places = demo.look(model, photos.test_inputs[:1])
    # By two layers, whose offset_scale is 2, on maps of half the picture's size.
    torch.testing.assert_close(places - pixels, torch.tensor([8.0, -4.0]).expand(36, 2))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("one_thread")
def test_demo_shows_what_it_claims(demo):
    """In half of its epochs, with room for another machine's rounding."""
    photos = demo.load()
    contestants = {demo.OURS: demo.DEFORMABLE, **demo.convolutions()}
    ours, best = (
        demo.train(name, contestants[name], photos, 6, 0).errors[-1]
        for name in (demo.OURS, demo.BEST)
    )
    assert ours < 0.75 * best
