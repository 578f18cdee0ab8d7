"""Processes of one group, which tests give work."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist

_SECONDS = 600  # for one piece of work: on a busy machine, the imports alone that the first one waits for take minutes


class Ranks:
    """run(function, *args) calls function(rank, *args) in each process at once and returns both results.

    `function` belongs to a module. Where one call fails, so does the test, and the next one gets new processes.
    """

    def __init__(self, count: int, backend: str):
        self.count, self.backend, self._processes, self._pipes = count, backend, [], []

    def run(self, function, *args) -> list:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))  # pipe.send() would share the tensors' memory
        errors, results = [], []
        for rank, pipe in enumerate(self._pipes):
            if errors or not pipe.poll(_SECONDS):
                errors.append(f"rank {rank} did not answer")
                continue
            result, error = pickle.loads(pipe.recv_bytes())
            results.append(result)
            errors += [f"rank {rank}: {error}"] if error else []
        if errors:
            self.stop()
            pytest.fail("\n".join(errors))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="ranks-")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, self.count, self.backend, store), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _work(pipe, rank, count, backend, store):
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": count}
    if backend == "nccl":
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    dist.init_process_group(backend, **options, timeout=datetime.timedelta(seconds=_SECONDS))
    while True:
        function, args = pickle.loads(pipe.recv_bytes())
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
        try:
            answer = function(rank, *args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
