"""CUDA graphs on a CPU: what is recorded reads and writes the same memory again, and no other."""


class Tape:
    """Replays by running what was recorded anew, into the results that it had then.

    As on a GPU, recording computes nothing, and a replay may write over the results of what was
    recorded later on the same tape, since these may lie where it has its own.
    """

    is_running = False
    """Whether a recording is made or replayed."""

    def __init__(self, device):
        self._made = []

    def record(self, run):
        results, others = self._run(run), self._run(run)
        pairs = zip(results, others, strict=True)
        made = [a for a, b in pairs if address(a) != address(b)]
        place = len(self._made)
        self._made.append(made)
        poison(made)

        def replay():
            for later in self._made[place + 1 :]:
                poison(later)
            for result, found in zip(results, self._run(run), strict=True):
                if address(result) != address(found):
                    result.copy_(found)

        return replay, results

    def _run(self, run):
        Tape.is_running = True
        try:
            return run()
        finally:
            Tape.is_running = False

    def follow(self):
        pass


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def poison(tensors):
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
