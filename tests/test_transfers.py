"""Transfers: the order of copies on streams that stand in for CUDA's; the ops that make them."""

import contextlib
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pabc.passes.transfers import fetch, stash
from pabc.runtime.transfers import Lane

CPU = torch.device("cpu")


@pytest.mark.parametrize("strides", [(40, 8, 1), (40, 1, 5)])
def test_ops_copy_and_keep_layouts(strides):
    cut = torch.randn(120).as_strided((3, 5, 8), strides)
    for op in (stash, lambda t: fetch(t, CPU), lambda t: fetch(t, CPU, t)):
        result = op(cut)
        assert torch.equal(result, cut) and result.stride() == strides
        assert result.data_ptr() != cut.data_ptr()
    torch.library.opcheck(torch.ops.pabc.stash.default, (cut,))
    torch.library.opcheck(torch.ops.pabc.fetch.default, (cut, CPU, cut))


class FakeStream:
    """A queue of things to do; each runs as late as the drawn order lets it."""

    def __init__(self):
        self.queue = []

    def record_event(self):
        event = {"done": False}
        self.queue.append(("record", event))
        return event

    def wait_event(self, event):
        self.queue.append(("wait", event))

    def advance(self):
        """Does the next thing, unless it waits."""
        kind, what = self.queue[0]
        if kind == "wait" and not what["done"]:
            return False
        if kind == "record":
            what["done"] = True
        elif kind == "run":
            what()
        self.queue.pop(0)
        return True


class FakeCuda:
    """As much of torch.cuda as a lane uses; copies are queued on the stream that is current."""

    def __init__(self):
        self.compute = self.current = FakeStream()
        self.streams = [self.compute]
        self.num_runs = 0

    def Stream(self, device):
        self.streams.append(FakeStream())
        return self.streams[-1]

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, function):
        self.num_runs += 1
        self.current.queue.append(("run", function))

    def drain(self, choose):
        """Runs all streams to their ends in an order that `choose` draws."""
        while busy := [stream for stream in self.streams if stream.queue]:
            order = choose(busy)
            assert any(stream.advance() for stream in order), "all streams wait for one another"


class QueuedCopies(torch.overrides.TorchFunctionMode):
    """Queues copies, and overwrites memory that is freed in the order of the compute stream."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda
        self.num_buffers = self.peak = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            self.queue_copy(*args[:2])
            return args[0]
        if function is torch.Tensor.clone:
            result = self.own(torch.empty_like(args[0]))
            self.queue_copy(result, args[0])
            return result
        result = function(*args, **(kwargs or {}))
        on_device = function is torch.empty_like and "pin_memory" not in (kwargs or {})
        return self.own(result) if on_device else result

    def queue_copy(self, target, source):
        """Neither tensor is kept alive: only its memory is."""
        memory, values = target.detach().numpy(), source.detach().numpy()
        self.cuda.run(lambda: memory.__setitem__(..., values))

    def own(self, buffer):
        """Memory of the stream that computes: freed, that stream's next kernel may write to it."""
        memory = buffer.detach().numpy()
        self.num_buffers += 1
        self.peak = max(self.peak, self.num_buffers)

        def free():
            self.num_buffers -= 1
            self.cuda.compute.queue.append(("run", lambda: memory.fill(-1.0)))

        weakref.finalize(buffer, free)
        return buffer


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_copies_are_right_in_any_order_that_the_streams_allow(data):
    """Cuts are overwritten once stashed; hints may be wrong; the host may run ahead or wait."""
    cuda = FakeCuda()
    lane, copies = Lane(CPU, cuda), QueuedCopies(cuda)
    choose = lambda busy: data.draw(st.permutations(busy))  # noqa: E731
    kept, found = [], []
    with copies:
        for i in range(data.draw(st.integers(1, 4))):
            cut = torch.zeros(4)
            memory = cut.detach().numpy()
            cuda.run(lambda memory=memory, i=i: memory.fill(i + 1.0))
            kept.append(lane.stash(cut))
            cuda.run(lambda memory=memory: memory.fill(-2.0))
            if data.draw(st.booleans()):
                cuda.drain(choose)
        for i in data.draw(st.lists(st.integers(0, len(kept) - 1), max_size=6)):
            hint = data.draw(st.sampled_from([*range(len(kept)), None]))
            buffer = lane.fetch(kept[i], None if hint is None else kept[hint])
            result = torch.zeros(4).numpy()
            memory = buffer.detach().numpy()
            cuda.run(lambda r=result, m=memory: r.__setitem__(..., m))
            found.append((i, result))
            del buffer
    cuda.drain(choose)
    assert all((result == i + 1.0).all() for i, result in found)
    assert copies.peak <= 3, "one leaves, one is used, one arrives"


def test_a_prefetch_runs_beside_the_computation():
    cuda = FakeCuda()
    lane = Lane(CPU, cuda)
    computation, side = cuda.streams
    with QueuedCopies(cuda):
        first, second = lane.stash(torch.ones(4)), lane.stash(torch.ones(4))
        cuda.drain(list)
        lane.fetch(first, second)
        kernel = ("run", lambda: None)
        computation.queue.append(kernel)  # what uses the first
        while computation.queue[0] is not kernel:
            computation.advance() or side.advance()
        while side.queue:
            assert side.advance(), "the second comes while the kernel has yet to run"
        num_copies = cuda.num_runs
        lane.fetch(second, None)
        assert cuda.num_runs == num_copies, "it is not copied again"
