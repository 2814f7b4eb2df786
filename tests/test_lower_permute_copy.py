"""Lowering of the copies around collectives, in a model that communicates by itself."""

import pytest
import torch
import torch.distributed as dist
from graphs import assert_same_graph
from lowering import lower, matches_of
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

pytestmark = pytest.mark.kernels
PARTS = 2


@pytest.fixture
def group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Switch(nn.Module):
    """From frames that are split to positions that are, and what is not sent at all."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        B, T, S, C = x.shape
        parts = x.reshape(B, T, PARTS, S // PARTS, C).permute(2, 0, 1, 3, 4).contiguous()
        received = wait_tensor(all_to_all_single(parts, None, None, self.group))
        back = received.permute(1, 0, 2, 3, 4).contiguous().reshape(B, -1, S // PARTS, C)
        return back, (x + 1).transpose(1, 2).contiguous()


def test_copies_around_collectives_become_calls(group):
    x = torch.randn(2, 3, 4, 5)
    gm, lowered = lower(Switch(group), x)
    expected_graph = f"""
        graph(%x):
            %split = view(%x, [2, 3, 2, 2, 5])
            %parts = permute(%split, [2, 0, 1, 3, 4])
            %packed = pabc.permute_copy(%parts, [0, 1, 2, 3, 4])
            %sent = _c10d_functional.all_to_all_single(%packed, [2], [2], {group.group_name!r})
            %waited = _c10d_functional.wait_tensor(%sent)
            %received = _c10d_functional.wait_tensor(%waited)
            %turned = permute(%received, [1, 0, 2, 3, 4])
            %unpacked = pabc.permute_copy(%turned, [0, 1, 2, 3, 4])
            %back = view(%unpacked, [2, -1, 2, 5])
            %more = add(%x, 1)
            %t = transpose.int(%more, 1, 2)
            %not_sent = clone(%t, memory_format=torch.contiguous_format)
            return (%back, %not_sent)
    """
    assert_same_graph(lowered, expected_graph)
    for found, expected in zip(lowered(x), gm(x), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert [each.reason for each in matches_of(lowered)] == [None, None]


class SwitchWide(Switch):
    def forward(self, x):
        parts = x.permute(6, 5, 4, 3, 2, 1, 0).contiguous()
        return wait_tensor(all_to_all_single(parts, None, None, self.group))


def test_reasons(group):
    _, lowered = lower(SwitchWide(group), torch.randn([2] * 7))
    assert [each.reason for each in matches_of(lowered)] == ["7 dimensions: at most 6"]
