"""`wan22 plan`, `--dry-run`, `wan22 download` and `wan22 doctor`: nothing is made, all is told."""

import json

import pytest

from tests.cli.commands import QUICK, picture, run
from tests.pipelines.loading.repositories import make_repository
from wan22 import tiny_checkpoint
from wan22.cli import downloading, planning
from wan22.pipelines.loading import preparing


@pytest.fixture
def hub(monkeypatch):
    """A hub that says that 126 GB are to be downloaded, and that nothing else can be asked."""
    monkeypatch.setattr(preparing, "bytes_to_download", lambda *_: 126 * 10**9)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a server was asked"))


def rows(out):
    """Return a table's entries by name."""
    found, name = {}, ""
    for line in out.splitlines():
        if line[:1].strip():
            name, _, entry = line.partition("  ")
            found[name] = entry.strip()
        else:
            found[name] += f" {line.strip()}"
    return found


def test_the_plan_of_a_release(here, hub):
    out, _ = run("plan", "Wan2.2-T2V-A14B", "--memory", 24, "--dtype", "bf16", "--frames", 41)
    found = rows(out)
    assert found["from"] == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert found["download"].startswith("126 GB that are not here yet, to ")
    assert found["video"].startswith("1280x720, 41 frames at 16 fps (2.6 s), 40 steps of UniPC, shift 12")
    assert found["passes"] == "80 of a transformer, for each video"
    assert found["memory"].startswith("by arithmetic, not measured: Wan2.2-T2V-A14B, 1280x720, 41 frames")
    assert "on 23.40 GB of cuda memory" in found["memory"] and "device peak" in found["memory"]
    assert found["time"].startswith("unknown, as the GPU is not here; by arithmetic")
    assert not list(here.iterdir())


def test_the_passes_of_guidance(here):
    for options, text, passes in (
        ([], "guidance 4 and 3", 40),
        (["--guidance", "gated"], "gated guidance 4 and 3", 28),
        (["--guidance", "nag"], "nag guidance 1 and 1", 20),
        (["--guidance", "cfg-zero*"], "cfg-zero* guidance 4 and 3", 38),
        (["--guidance-interval", "0.2,0.7"], "guidance 4 and 3", 30),
        (["--guidance", '{"name": "slg", "layers": [3]}'], "slg guidance 4 and 3", 44),
        (["-g", ",".join(["4"] * 5 + ["1"] * 15)], "guidance 1 to 4", 25),
    ):
        out, _ = run("t2v", "a", "--dry-run", "--json", *options)
        settings = json.loads(out)["settings"]
        assert settings["passes"] == passes and f", {text}" in settings["text"]
    _, err = run("t2v", "a", "--dry-run", "--guidance", "slg", code=1)
    assert "layers=9: the transformer's layers are 0 to 5" in err


def test_a_dry_run(here, hub):
    arguments = ["--model", "Wan-AI/Wan2.2-I2V-A14B", "--dtype", "bf16", "--memory", "16GB", "--frames", 5]
    picture("a.png", (832, 480))
    out, _ = run(
        "i2v", "a.png", "it moves", *arguments, "--height", 480, "--width", 832, "--dry-run", "--json"
    )
    found = json.loads(out)
    assert found["settings"]["passes"] == 80 and found["fits"] and found["download_bytes"] == 126 * 10**9
    assert found["device_bytes"] < 16e9 and found["flop_per_step"] > 1e12
    assert found["output"] == "it-moves.mp4" and [path.name for path in here.iterdir()] == ["a.png"]


def test_what_does_not_fit_is_told(here, monkeypatch):
    def refused(*_):
        raise ValueError("it does not fit; 64x64 would")

    monkeypatch.setattr(planning, "plan_of", refused)
    found = rows(run("plan", "tiny-t2v", "--memory", 3)[0])
    assert found["memory"] == "by arithmetic, not measured: it does not fit; 64x64 would"
    assert found["time"] == "unknown"


def test_a_plan_of_the_miniature_has_a_time(here):
    found = json.loads(run("plan", "tiny-i2v", "--json")[0])
    assert found["here"] and found["download_bytes"] == 0 and found["seconds_per_step"] > 0
    out, _ = run("t2v", "a", *QUICK, "-g", 1, "--dry-run")
    assert "nothing: it is on this machine" in out and rows(out)["passes"].startswith("2 of")
    assert rows(out)["time"].startswith("by arithmetic, not measured: ")
    assert not list(here.iterdir())


def test_dry_runs_of_many(here):
    (here / "list.txt").write_text("red\nblue\n")
    out, err = run("batch", "list.txt", "-o", "out", "--dry-run")
    assert "2 items, of which the first takes" in err and "64x64, 17 frames" in out
    assert not (here / "out").exists()
    run("t2v", "a", *QUICK, "-o", "a.mp4", "-q")
    out, _ = run("reproduce", "a.mp4", "--dry-run")
    assert "64x64, 5 frames" in out and not (here / "a-again.mp4").exists()


def test_without_a_hub_its_size_is_unknown(here, monkeypatch):
    monkeypatch.setattr(preparing, "bytes_to_download", lambda *_: None)
    loading = planning.Loading(model="Wan2.2-T2V-A14B")
    found = planning._findings("t2v", loading, None)
    words = planning._in_words(found)
    assert words["download"].startswith("unknown, as the hub does not answer; its weights have 69 GB")


# ---- downloads ----


@pytest.fixture
def repository(tmp_path, monkeypatch):
    make_repository(tmp_path / "hub", "org/name", {"main": tiny_checkpoint()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    located = downloading.locate
    hub = {"cache_dir": tmp_path / "hub", "local_files_only": True}

    def in_cache(source, revision):
        from wan22.pipelines.loading.load import locate

        return locate(source, hub) if source == "org/name" else located(source, revision)

    monkeypatch.setattr(downloading, "locate", in_cache)
    monkeypatch.setattr(downloading, "find_model", lambda model, _: model)
    return tmp_path / "hub"


def test_a_download_is_confirmed_first(here, repository, monkeypatch):
    monkeypatch.setattr(preparing, "bytes_to_download", lambda *_: 1_230_000)
    _, err = run("download", "org/name", code=1)
    assert "download 0.00123 GB of org/name to" in err and "--yes agrees" in err
    out, err = run("download", "org/name", "--yes")
    assert "GB are free in" in err
    assert out.strip().startswith(str(repository / "models--org--name" / "snapshots"))


def test_what_is_here_is_not_downloaded(here, repository):
    out, err = run("download", tiny_checkpoint())
    assert out == f"{tiny_checkpoint()}\n" and "on this machine already" in err
    assert json.loads(run("download", "org/name", "--json")[0])["folder"].startswith(str(repository))


def test_what_a_repository_is(here, repository, monkeypatch):
    found = json.loads(run("info", "org/name", "--json")[0])
    assert (found["layout"], found["variant"], found["experts"]) == ("Diffusers", "tiny-t2v", 2)
    assert found["kind"] == "WanPipeline" and "transformer_2" in found["models"]
    assert "tiny-t2v" in run("info", "org/name")[0]
    _, err = run("info", "a/b/c", code=1)
    assert "there is no file or folder a/b/c" in err


# ---- the machine ----


def test_doctor(here):
    found = json.loads(run("doctor", "--json")[0])
    assert (
        found["device"] == "cpu" and found["packages"]["torch"] and found["attention"]["native"] == "can run"
    )
    assert "the miniature" in found["recommended"] and "ffmpeg" in found["ffmpeg"]
    out, _ = run("doctor")
    for word in ("attention", "ffmpeg", "are free", "recommended", "hub"):
        assert word in out


def test_doctor_says_what_a_card_is_good_for():
    from wan22.cli.doctor import _advice

    assert "all models stay" in _advice("cuda", [80.0])
    assert "Wan2.2-TI2V-5B" in _advice("cuda", [8.0]) and "1.3B" in _advice("cuda", [4.0])
