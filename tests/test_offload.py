"""Slots in host memory: the pass, and the order of copies on streams that stand in for CUDA's."""

import contextlib
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Case
from phases import FakeTrajectory, inline, lift, specialize, store_all
from stages import compile_flat, regions_of, run_graph, run_to, with_hoisted

from pabc.passes import (
    offload_cuts_pass,
)
from pabc.passes.cache import cache_read, cache_write, fetch_cached, stash_unless
from pabc.passes.transfers import fetch, stash
from pabc.runtime.transfers import Lane

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText")]
FACTORIZED = CASES[0]
CPU = torch.device("cpu")


def offload(case, captured, cache_dtype="keep"):
    """With the CPU as the accelerator: the ops then copy from it to itself."""
    gm = run_to(captured(case)[1], "encode", cache_dtype=cache_dtype)
    return offload_cuts_pass(gm, accelerators=("cpu",))


# ---- the pass ----


def test_on_a_cpu_the_graph_is_left_as_it_is(captured):
    gm = run_to(captured(FACTORIZED)[1], "encode")
    assert offload_cuts_pass(gm) is gm


def test_a_read_is_fetched_and_a_write_stashed(captured):
    gm = offload(FACTORIZED, captured)
    for node in gm.graph.nodes:
        if node.target is cache_read:
            fetched, stashed, _ = node.users
            assert (fetched.target, stashed.target) == (fetch_cached, stash_unless)
            assert fetched.args == (node, (CPU,))
        if node.target is cache_write:
            assert not node.users and node.args[3].target is stash_unless


@pytest.mark.parametrize("cache_dtype", ["keep", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_equal_the_oracle_and_the_graph_without_offload(case: Case, cache_dtype, captured):
    gm, call = offload(case, captured, cache_dtype), case.call(step=1)
    plain = run_to(captured(case)[1], "encode", cache_dtype=cache_dtype)
    slots = range(len(regions_of(gm)))
    kept = store_all(gm, case.call(step=0))
    for reused in ((), (0,), tuple(slots[::2]), tuple(slots)):
        stored = [slot for slot in slots if slot not in reused]
        held = {slot: kept[slot] for slot in reused}
        oracle, other = FakeTrajectory(held), FakeTrajectory(held)
        phase = specialize(gm, reused=reused, stored=stored)
        phase.graph.lint()
        expected = run_graph(plain, call, other)
        assert torch.equal(run_graph(gm, call, oracle), expected)
        with torch.no_grad():
            inputs = [*with_hoisted(phase, call), *(t for slot in reused for t in kept[slot])]
            outputs, results = inline(phase)(*inputs)
        assert torch.equal(outputs[0], expected)
        for writes in (oracle.writes, other.writes):
            wanted = [t for slot in stored for t in writes[slot]]
            for a, b in zip(results, wanted, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_phase_fetches_one_ahead_and_stashes_what_it_stores(captured):
    gm = offload(FACTORIZED, captured, "fp8")
    phase = specialize(gm, reused=(0, 3), stored=(1,))
    nodes = list(phase.graph.nodes)
    held = [n for n in nodes if n.op == "placeholder"][-4:]
    fetches = [n for n in nodes if n.target is fetch]
    following = [*held[1:], None]
    assert [n.args[0] for n in fetches] == held
    assert [(*n.args[2:], None)[0] for n in fetches] == following
    assert sum(n.target is stash for n in nodes) == 2
    called = [n for n in nodes if n.op == "call_module" and n.target == "spatial_0"]
    assert not called
    computed = next(n for n in nodes if n.op == "call_module" and n.target not in ("decode_0",))
    assert nodes.index(fetches[1]) < nodes.index(computed) < nodes.index(fetches[2])


@pytest.mark.parametrize("strides", [(40, 8, 1), (40, 1, 5)])
def test_ops_copy_and_keep_layouts(strides):
    cut = torch.randn(120).as_strided((3, 5, 8), strides)
    for op in (stash, lambda t: fetch(t, CPU), lambda t: fetch(t, CPU, t)):
        result = op(cut)
        assert torch.equal(result, cut) and result.stride() == strides
        assert result.data_ptr() != cut.data_ptr()
    torch.library.opcheck(torch.ops.pabc.stash.default, (cut,))
    torch.library.opcheck(torch.ops.pabc.fetch.default, (cut, CPU, cut))


# ---- the order of copies ----


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


@pytest.mark.slow
def test_inductor_takes_the_ops(captured):
    gm = offload(FACTORIZED, captured, "bf16")
    kept, call = store_all(gm, FACTORIZED.call(step=0)), FACTORIZED.call(step=1)
    phase = specialize(gm, reused=(0, 1, 2), stored=(3, 4))
    flat, weights = lift(inline(phase))
    inputs = [*with_hoisted(phase, call), *(t for slot in range(3) for t in kept[slot])]
    with torch.no_grad():
        found = compile_flat(flat)(*weights, *inputs)
        expected = flat(*weights, *inputs)
    assert (found[0] - expected[0]).abs().max() <= 1e-5
    for result, other in zip(found[1:], expected[1:], strict=True):
        assert (result.dtype, result.stride()) == (other.dtype, other.stride())
        torch.testing.assert_close(result, other, rtol=2.0**-7, atol=1e-5)
