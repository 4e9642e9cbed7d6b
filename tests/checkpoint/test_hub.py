"""Models of the Hugging Face Hub, read from a cache of its layout: addresses, commits, records, refusals in one line."""

import json
import os
import subprocess
import sys

import helpers
import hub_cache
import huggingface_hub
import jax
import pytest
from huggingface_hub import constants, errors
from toy_state import RQTRANSFORMER, RQVAE, assert_equal, fill, model_state_of, shapes_of

from rq_jax import checkpoint, recipes
from rq_jax.checkpoint import hub
from rq_jax.interop import export
from rq_jax.training import cli

OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = {OLD: fill(shapes_of("rqvae"), 1), NEW: fill(shapes_of("rqvae"), 2)}


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    """Two commits of owner/name: each is a tokenizer, with a pair in `sub`. main is the new one, the tag v1 the old."""

    def write(snapshot):
        tokenizer = {"model": RQVAE}, WEIGHTS[snapshot.name]
        checkpoint.save_model(snapshot, *tokenizer)
        checkpoint.save_model(snapshot / "sub", {"model": RQTRANSFORMER}, fill(shapes_of("rqtransformer")))
        checkpoint.save_model(snapshot / "sub" / "tokenizer", *tokenizer)

    made = hub_cache.make(tmp_path / "cache", dict.fromkeys(WEIGHTS, write), {"main": NEW, "v1": OLD})
    hub_cache.use(monkeypatch, tmp_path / "cache")
    yield made
    hub._download.cache_clear()


def refusal(address):
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(address)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "revision, commit",
    [("", NEW), ("@main", NEW), ("@v1", OLD), (f"@{OLD}", OLD)],
    ids=["none", "branch", "tag", "commit"],
)
def test_an_address_is_a_model_directory(revision, commit):
    loaded = checkpoint.load_model(f"hf://owner/name{revision}")
    assert_equal(loaded.variables, jax.device_get(WEIGHTS[commit]))
    pair = checkpoint.load_model(f"hf://owner/name{revision}/sub")
    assert pair.config["model"]["name"] == "rqtransformer"
    assert_equal(pair.tokenizer.variables, jax.device_get(WEIGHTS[commit]))
    assert_equal(
        checkpoint.load_tokenizer(f"hf://owner/name{revision}/sub/tokenizer").variables, pair.tokenizer.variables
    )


def test_training_starts_from_an_address():
    state = model_state_of("rqvae", 0)
    started = checkpoint.start_from("hf://owner/name@v1", state)
    assert_equal(jax.device_get(started.variables), jax.device_get(WEIGHTS[OLD]))
    assert checkpoint.step_of("hf://owner/name") is None
    with pytest.raises(ValueError, match="holds a 'rqtransformer', not a stage-1 run"):
        checkpoint.load_tokenizer("hf://owner/name/sub")


def test_a_process_reads_one_commit(repository):
    before = checkpoint.local_directory("hf://owner/name")
    (repository / "refs" / "main").write_text(OLD)
    assert checkpoint.local_directory("hf://owner/name") == before
    assert checkpoint.origin_of("hf://owner/name") == {"checkpoint": "hf://owner/name", "commit": NEW}
    hub._download.cache_clear()
    assert checkpoint.origin_of("hf://owner/name")["commit"] == OLD


def test_a_record_holds_no_path_of_this_machine_where_it_can_do_without(tmp_path):
    for given, recorded in {
        tmp_path / "checkpoints" / "emoji": "checkpoints/emoji",
        tmp_path: ".",
        "runs/rqt": "runs/rqt",
        "/elsewhere/rqt": "/elsewhere/rqt",
        f"{tmp_path}-other/rqt": f"{tmp_path}-other/rqt",
    }.items():
        assert checkpoint.origin_of(str(given), tmp_path) == {"checkpoint": recorded}
        assert checkpoint.origin_of(given) == {"checkpoint": str(given)}
    assert checkpoint.origin_of("hf://owner/name", tmp_path)["checkpoint"] == "hf://owner/name"


def test_only_a_model_directory_is_asked_for(monkeypatch, repository):
    asked = {}

    def download(name, **given):
        asked.update(given, name=name)
        return str(repository / "snapshots" / NEW)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.local_directory("hf://owner/name@v1/sub[1]").name == "sub[1]"
    patterns = asked.pop("allow_patterns")
    assert asked == {"name": "owner/name", "revision": "v1"}
    below = [
        "config.json",
        "model.safetensors",
        "tokenizer/model-00001-of-00002.safetensors",
        "discriminator/config.json",
    ]
    wanted = [*(f"sub[1]/{name}" for name in below), "sub[1]/tokenizer/model.safetensors.index.json"]
    others = [
        "config.json",
        "sub1/config.json",
        "sub[1]/metrics.jsonl",
        "sub[1]/checkpoints/1/x.safetensors",
        "sub[1]/README.md",
    ]
    assert list(huggingface_hub.utils.filter_repo_objects([*wanted, *others], allow_patterns=patterns)) == wanted


def test_commands_leave_addresses_as_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert cli.model_path("hf://owner/name@v1/sub") == "hf://owner/name@v1/sub"
    assert cli.model_path("~/run") == "/home/ann/run"


def test_a_run_records_the_commit_that_it_started_from(tmp_path):
    config = {
        "tokenizer": "hf://owner/name@main/sub/tokenizer",
        "init_from": "hf://owner/name",
        "data": {"data_dir": None},
    }
    recorded = recipes.with_whole_paths(config)
    assert recorded["tokenizer"] == f"hf://owner/name@{NEW}/sub/tokenizer"
    assert recorded["init_from"] == f"hf://owner/name@{NEW}"
    assert recipes.with_whole_paths(recorded) == recorded


def test_a_record_stands_for_its_address_without_a_revision():
    before = f"hf://owner/name@{OLD}/sub"
    assert checkpoint.pinned_as("hf://owner/name/sub", before) == before
    assert checkpoint.pinned_as("hf://owner/name/sub/", before) == before
    for other in ("hf://owner/name", "hf://owner/name@main/sub", "hf://owner/other/sub"):
        assert checkpoint.pinned_as(other, before) == other
    assert checkpoint.pinned_as("hf://owner/name", "runs/vae") == checkpoint.pinned_as("hf://owner/name", None)


def test_the_environment_is_honoured_and_the_package_loaded_where_an_address_is(repository):
    program = """
import sys
from rq_jax import checkpoint, evaluation, interop, recipes, training
from rq_jax.training import cli
print("huggingface_hub" in sys.modules, checkpoint.origin_of("hf://owner/name")["commit"])
with cli.one_line_errors():
    checkpoint.load_model("hf://owner/other")
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(repository.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=helpers.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (2, ["False", NEW])
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 'hf://owner/other': it is not in the cache, and HF_HUB_OFFLINE is set")


# --- what is refused ------------------------------------------------------------------------------------------

MALFORMED = {
    "hf://owner": "Repository id must be 'namespace/name', got 'owner'",
    "hf://owner/name@": "Empty revision after '@'",
    "hf://datasets/owner/name": "it names a dataset, not a model",
    "hf://owner/name/../../other": "its folder leads elsewhere",
}


@pytest.mark.parametrize("address", MALFORMED)
def test_a_malformed_address_is_refused(address):
    expected = f"'{address}' is no address of a model ({MALFORMED[address]}); give hf://owner/name[@revision][/folder]"
    assert refusal(address) == expected


@pytest.mark.parametrize("address", ["hf://owner/other", "hf://owner/name@v2", f"hf://owner/name@{'c' * 40}"])
def test_what_is_not_in_the_cache_is_refused_offline(address):
    why = "it is not in the cache, and HF_HUB_OFFLINE is set"
    assert refusal(address) == f"'{address}': {why}; download it once with a network, or give a directory"


def test_a_part_of_a_download_is_refused_offline(repository):
    files = {
        name: {"size": 1, "blob_id": "x"} for name in ("config.json", "model.safetensors", "tokenizer/config.json")
    }
    (repository / "trees").mkdir()
    (repository / "trees" / f"{NEW}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert refusal("hf://owner/name").startswith(
        "'hf://owner/name': only a part of it is in the cache, and HF_HUB_OFFLINE"
    )


def response(kind, message="one\n\ntwo"):
    import httpx2

    request = httpx2.Request("GET", "http://localhost")
    return kind(message, response=httpx2.Response(404, request=request))


FAILURES = {
    "unknown": (
        response(errors.RepositoryNotFoundError),
        "the Hub has no model 'owner/name' that you may read; check the name, or run hf auth login",
    ),
    "gated": (
        response(errors.GatedRepoError),
        "'owner/name' asks its readers to register; accept its terms on the Hub, then run hf auth login",
    ),
    "revision": (
        response(errors.RevisionNotFoundError),
        "'owner/name' has no revision 'v9'; give a branch, a tag or a whole commit",
    ),
    "no network": (
        errors.LocalEntryNotFoundError("x"),
        "it is not in the cache, and the Hub cannot be reached; download it once with a network, or give a directory",
    ),
    "server": (response(errors.HfHubHTTPError), "it could not be downloaded ('one two'); run it again"),
    "disk": (OSError(28, "No space left"), "it could not be downloaded ('[Errno 28] No space left'); run it again"),
    "another": (RuntimeError("odd"), "it could not be downloaded ('odd'); run it again"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_is_one_line(monkeypatch, failure):
    error, expected = FAILURES[failure]

    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert refusal("hf://owner/name@v9") == f"'hf://owner/name@v9': {expected}"


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fix = "run pip install 'rq_jax[hub]', or give a directory"
    assert refusal("hf://owner/name") == f"'hf://owner/name' needs the package huggingface_hub, at least 2.4; {fix}"


def test_a_repository_of_something_else_is_named_by_its_address():
    with pytest.raises(FileNotFoundError, match="^'hf://owner/name/none' is no run directory: it has no config.json"):
        checkpoint.load_model("hf://owner/name/none")


def test_export_takes_an_address(tmp_path):
    with pytest.raises(ValueError, match="^model.width: 2 cannot be exported"):
        export.export_model("hf://owner/name", tmp_path / "out.safetensors")
