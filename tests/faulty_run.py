"""A toy run in a process of its own, for tests that stop it from outside: python faulty_run.py <workdir> [k=v ...]."""

import logging
import resource
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import conftest  # noqa: E402, F401  # settings that hold for every test
import jax  # noqa: E402
from toy_run import ToyDataset, train  # noqa: E402

from rq_jax.training import cli  # noqa: E402

jax.config.update("jax_enable_compilation_cache", False)  # a kill would leave half an entry to everybody


class SlowDataset(ToyDataset):
    """Takes its time, so that there is something to interrupt; says when it begins and where.

    From then on no file can grow beyond `file_bytes`, as on a full disk.
    """

    def __init__(self, seconds, file_bytes=None):
        super().__init__()
        self.seconds, self.file_bytes, self.begun = seconds, file_bytes, False

    def __next__(self):
        if not self.begun:
            print(f"begun {self.position}", flush=True)
            if self.file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, resource.RLIM_INFINITY))
        self.begun = True
        time.sleep(self.seconds)
        return super().__next__()


def main() -> None:
    workdir, *given = sys.argv[1:]
    settings = {name: int(value) for name, value in (pair.split("=") for pair in given)}
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows too large is an error and no signal
    dataset = SlowDataset(settings.pop("milliseconds", 30) / 1000, settings.pop("file_bytes", None))
    with cli.one_line_errors():
        state = train(workdir, dataset, **settings)
    print(f"ended {int(state.step)}", flush=True)


if __name__ == "__main__":
    main()
