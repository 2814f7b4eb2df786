"""The passes, one per file: functions from graph to graph; :mod:`pabc.pipeline` has their order.

Code outside of this folder imports only this module (`tests/test_floors.py`).
"""

from pabc.internals.onednn import lowering_onednn

from .attention_ops import register_attention_op
from .axes import name_axes_pass, verify_axes
from .blocks import split_blocks_pass, verify_blocks
from .cache import insert_cache_pass, verify_cache
from .canonicalize import canonicalize_pass
from .capture import CONSTANTS, capture, find_tensor
from .code import BlockFunction, CompiledBlock, Listing, Package
from .emit import compile_blocks, example_inputs, prepare_inductor, run_blocks
from .encode import CacheDtype, encode_cuts_pass, form_of
from .encode import decode as decode_cut
from .encode import encode as encode_cut
from .enlarge import enlarge_call
from .facts import (
    Block,
    Blocks,
    Captured,
    Denoised,
    Enlarged,
    Facts,
    Guarded,
    InputSizes,
    KernelMatch,
    KernelMatches,
    Lifted,
    Marked,
    ModelCall,
    PhaseSlots,
    PrologueGraph,
    Regions,
    ResultIndex,
    ShardedAxis,
    Shards,
    Signature,
    Tagged,
)
from .flatten import inline_regions_pass, lift_weights_pass, verify_inline, verify_lift
from .flops import FlopCounter
from .fold import fold_sizes_pass, verify_sizes
from .forecast import Cuts, Reused
from .forecast import forecast as forecast_cut
from .guard_ops import (
    GUARD_OPS,
    cache_read,
    cache_write,
    compute_unless,
    fetch_cached,
    forecast_cached,
)
from .held import lay_out_held_pass
from .hoist import hoist_invariants_pass, hoist_nothing, needed_by, verify_hoist
from .ir import (
    Attention,
    Axis,
    Factor,
    Reach,
    Region,
    attribute,
    cannot_be_recorded,
    copy_into,
    is_effect,
    is_opaque,
    make_module,
    output_node,
    user_inputs,
    value,
)
from .lower import Kernels, lower_pass, summarize
from .nest import nest_regions_pass, verify_nest
from .nesting.skips import find_skipped
from .offload import offload_cuts_pass
from .onednn import onednn_is_faster, use_onednn_pass
from .outline import outline_regions_pass, verify_outline
from .regions import Cut, mark_regions_pass, verify_marks
from .repeats import keep_one, keep_unrepeated_pass, verify_repeats
from .rewrites import rewrite_formulas_pass
from .shard import Sharding, Weigh, shard_batch, shard_pass, shard_tokens, verify_shard
from .sharding.moves import Collective, find_collective, find_collectives
from .sharding.places import Ranks
from .sharding.sharder import Output
from .specialize import runs_nothing, specialize_phase_pass, verify_phase
from .tag import tag_attention_pass, tagged, verify_tags
from .tracing.alone import before_trace
from .tracing.calls import ResultForm
from .tracing.fakes import share_fake_mode
from .tracing.foreign import refuse_hooks
from .tracing.frozen import PLAIN_VALUES, FrozenObject, Same, freeze, is_library
from .tracing.guards import Reads
from .tracing.holders import MISSING, Change, Holder, HolderKind, container_class
from .tracing.hooks import HookCall
from .tracing.modules import (
    ORDER,
    Description,
    HolderKey,
    ModelState,
    describe,
    is_state,
)
from .tracing.numbers import Comparison
from .tracing.opaque import OpaqueCall
from .tracing.parameters import has_functions_of_its_own
from .tracing.python_state import Snapshot
from .tracing.records import (
    CallAgain,
    Checked,
    MaskCount,
    NumberAnswer,
    Read,
    RepeatCount,
    ShapesAgain,
)
from .tracing.sizes import Sizes, concrete, hinted
from .tracing.tensor_call import ResultLayout, TensorCall
from .tracing.untouched import untouched
from .tracing.walk import StateWalk, find_holders, walk_from

__all__ = [  # noqa: RUF022
    # The passes, in the order in which they run, and what checks their results.
    "before_trace",
    "capture",
    "canonicalize_pass",
    "name_axes_pass",
    "verify_axes",
    "enlarge_call",
    "tag_attention_pass",
    "verify_tags",
    "mark_regions_pass",
    "verify_marks",
    "shard_pass",
    "shard_tokens",
    "shard_batch",
    "verify_shard",
    "outline_regions_pass",
    "verify_outline",
    "nest_regions_pass",
    "verify_nest",
    "hoist_invariants_pass",
    "hoist_nothing",
    "verify_hoist",
    "keep_unrepeated_pass",
    "verify_repeats",
    "insert_cache_pass",
    "verify_cache",
    "encode_cuts_pass",
    "offload_cuts_pass",
    "specialize_phase_pass",
    "verify_phase",
    "inline_regions_pass",
    "verify_inline",
    "lift_weights_pass",
    "verify_lift",
    "fold_sizes_pass",
    "verify_sizes",
    "lay_out_held_pass",
    "rewrite_formulas_pass",
    "use_onednn_pass",
    "lower_pass",
    "split_blocks_pass",
    "verify_blocks",
    # Choices that users make, and what they can add.
    "Cut",
    "CacheDtype",
    "Kernels",
    "Output",
    "register_attention_op",
    "Sharding",
    "Weigh",
    # Facts that passes take and return.
    "Facts",
    "ModelCall",
    "Captured",
    "Signature",
    "Denoised",
    "Enlarged",
    "Tagged",
    "Marked",
    "Shards",
    "ShardedAxis",
    "PrologueGraph",
    "Regions",
    "Guarded",
    "PhaseSlots",
    "InputSizes",
    "Lifted",
    "ResultIndex",
    "KernelMatch",
    "KernelMatches",
    "Block",
    "Blocks",
    # What these are made of.
    "ResultForm",
    "Attention",
    "Axis",
    "Factor",
    "Region",
    "Ranks",
    "Collective",
    "find_collective",
    "find_collectives",
    "find_skipped",
    "summarize",
    "tagged",
    "FlopCounter",
    # Code for graphs, made by Inductor.
    "BlockFunction",
    "CompiledBlock",
    "Listing",
    "Package",
    "compile_blocks",
    "run_blocks",
    "example_inputs",
    "prepare_inductor",
    "lowering_onednn",
    "onednn_is_faster",
    # Ops of guarded graphs.
    "GUARD_OPS",
    "Cuts",
    "Reused",
    "forecast_cut",
    "cache_read",
    "cache_write",
    "compute_unless",
    "fetch_cached",
    "forecast_cached",
    "keep_one",
    # The forms in which cuts are kept, outside of graphs.
    "encode_cut",
    "decode_cut",
    "form_of",
    # Graphs: their tensors, nodes and parts.
    "CONSTANTS",
    "find_tensor",
    "attribute",
    "copy_into",
    "make_module",
    "needed_by",
    "output_node",
    "user_inputs",
    "value",
    "Reach",
    "cannot_be_recorded",
    "is_effect",
    "is_opaque",
    "runs_nothing",
    # Values read from data, which the runtime reads again.
    "Reads",
    "Read",
    "Checked",
    "CallAgain",
    "ShapesAgain",
    "MaskCount",
    "RepeatCount",
    "NumberAnswer",
    "Comparison",
    "TensorCall",
    "ResultLayout",
    # The Python state of a model, which the runtime watches.
    "ModelState",
    "Description",
    "ORDER",
    "Holder",
    "HolderKey",
    "HolderKind",
    "container_class",
    "Same",
    "FrozenObject",
    "Snapshot",
    "StateWalk",
    "Change",
    "MISSING",
    "PLAIN_VALUES",
    "freeze",
    "describe",
    "find_holders",
    "walk_from",
    "is_library",
    "is_state",
    "has_functions_of_its_own",
    "untouched",
    # Opaque modules and hooks.
    "OpaqueCall",
    "HookCall",
    "refuse_hooks",
    # Sizes that stay free, and fake tensors.
    "Sizes",
    "concrete",
    "hinted",
    "share_fake_mode",
]
