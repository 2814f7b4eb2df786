"""The passes, one a file: functions from graph to graph, in the order of :mod:`pabc.pipeline`.

This module is the front door: code outside of this folder imports nothing else of it
(`tests/test_floors.py`).
"""

from .attention_ops import register_attention_op
from .axes import name_axes_pass, verify_axes
from .blocks import split_blocks_pass
from .cache import (
    Cuts,
    cache_read,
    cache_write,
    compute_unless,
    decode_cached,
    encode_unless,
    fetch_cached,
    insert_cache_pass,
    stash_unless,
    verify_cache,
)
from .canonicalize import canonicalize_pass
from .capture import CONSTANTS, Signature, capture, find_tensor
from .emit import Code, compile_blocks, example_inputs, prepare_inductor, run_blocks
from .encode import CacheDtype, encode_cuts_pass
from .enlarge import enlarge_call
from .flatten import Place, inline_regions_pass, lift_weights_pass
from .flops import FlopCounter
from .hoist import hoist_invariants_pass, needed_by, verify_hoist
from .ir import (
    Attention,
    Axis,
    Factor,
    Reach,
    Region,
    attribute,
    copy_into,
    is_collective,
    is_effect,
    is_opaque,
    make_module,
    output_node,
    user_inputs,
    value,
)
from .lower import Kernels, Lowering, lower_pass, summarize
from .offload import offload_cuts_pass
from .onednn import lowering_onednn, use_onednn_pass
from .outline import outline_regions_pass, verify_outline
from .regions import Cut, mark_regions_pass, verify_marks
from .repeats import keep_one, keep_unrepeated_pass, verify_repeats
from .rewrites import rewrite_formulas_pass
from .shard import Sharded, shard_batch_pass, shard_pass, verify_shard
from .sharding.moves import Collective, find_collectives
from .sharding.places import Ranks
from .sharding.sharder import Output
from .specialize import specialize_phase_pass, verify_phase
from .tag import tag_attention_pass, tagged, verify_tags
from .tracing.calls import ResultForm
from .tracing.fakes import share_fake_mode
from .tracing.foreign import refuse_hooks
from .tracing.frozen import FrozenObject, Same, is_library
from .tracing.guards import Reads
from .tracing.holders import Holder, HolderKind
from .tracing.hooks import HookCall
from .tracing.modules import (
    Description,
    HolderKey,
    ModelState,
    describe,
    describe_object,
    is_state,
)
from .tracing.numbers import Comparison
from .tracing.opaque import OpaqueCall
from .tracing.parameters import has_functions_of_its_own
from .tracing.records import (
    CallAgain,
    Checked,
    MaskCount,
    NumberAnswer,
    Read,
    RepeatCount,
    ShapesAgain,
)
from .tracing.sizes import Sizes, concrete, fold_sizes, hinted
from .tracing.tensor_call import ResultLayout, TensorCall
from .tracing.untouched import untouched
from .tracing.walk import find_holders

__all__ = [  # noqa: RUF022
    # The passes, in the order in which they run, and what checks their results.
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
    "shard_batch_pass",
    "verify_shard",
    "outline_regions_pass",
    "verify_outline",
    "hoist_invariants_pass",
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
    "lift_weights_pass",
    "fold_sizes",
    "rewrite_formulas_pass",
    "use_onednn_pass",
    "lower_pass",
    "split_blocks_pass",
    # Choices that users make, and what they can add.
    "Cut",
    "CacheDtype",
    "Kernels",
    "Output",
    "register_attention_op",
    # Facts that passes find.
    "Signature",
    "ResultForm",
    "Attention",
    "Axis",
    "Factor",
    "Region",
    "Sharded",
    "Ranks",
    "Collective",
    "find_collectives",
    "Place",
    "Lowering",
    "summarize",
    "tagged",
    "FlopCounter",
    # Code for graphs, made by Inductor.
    "Code",
    "compile_blocks",
    "run_blocks",
    "example_inputs",
    "prepare_inductor",
    "lowering_onednn",
    # Ops of guarded graphs.
    "Cuts",
    "cache_read",
    "cache_write",
    "compute_unless",
    "decode_cached",
    "encode_unless",
    "fetch_cached",
    "stash_unless",
    "keep_one",
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
    "is_collective",
    "is_effect",
    "is_opaque",
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
    "Holder",
    "HolderKey",
    "HolderKind",
    "Same",
    "FrozenObject",
    "describe",
    "describe_object",
    "find_holders",
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
