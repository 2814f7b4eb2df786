"""The passes, one a file: functions from graph to graph, in the order of :mod:`pabc.pipeline`."""

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

__all__ = [
    "CONSTANTS",
    "Attention",
    "Axis",
    "CacheDtype",
    "CallAgain",
    "Checked",
    "Code",
    "Collective",
    "Comparison",
    "Cut",
    "Cuts",
    "Description",
    "Factor",
    "FlopCounter",
    "FrozenObject",
    "Holder",
    "HolderKey",
    "HolderKind",
    "HookCall",
    "Kernels",
    "Lowering",
    "MaskCount",
    "ModelState",
    "NumberAnswer",
    "OpaqueCall",
    "Output",
    "Place",
    "Ranks",
    "Reach",
    "Read",
    "Reads",
    "Region",
    "RepeatCount",
    "ResultForm",
    "ResultLayout",
    "Same",
    "ShapesAgain",
    "Sharded",
    "Signature",
    "Sizes",
    "TensorCall",
    "attribute",
    "cache_read",
    "cache_write",
    "canonicalize_pass",
    "capture",
    "compile_blocks",
    "compute_unless",
    "concrete",
    "copy_into",
    "decode_cached",
    "describe",
    "describe_object",
    "encode_cuts_pass",
    "encode_unless",
    "enlarge_call",
    "example_inputs",
    "fetch_cached",
    "find_collectives",
    "find_holders",
    "find_tensor",
    "fold_sizes",
    "has_functions_of_its_own",
    "hinted",
    "hoist_invariants_pass",
    "inline_regions_pass",
    "insert_cache_pass",
    "is_collective",
    "is_effect",
    "is_library",
    "is_opaque",
    "is_state",
    "keep_one",
    "keep_unrepeated_pass",
    "lift_weights_pass",
    "lower_pass",
    "lowering_onednn",
    "make_module",
    "mark_regions_pass",
    "name_axes_pass",
    "needed_by",
    "offload_cuts_pass",
    "outline_regions_pass",
    "output_node",
    "prepare_inductor",
    "refuse_hooks",
    "register_attention_op",
    "rewrite_formulas_pass",
    "run_blocks",
    "shard_batch_pass",
    "shard_pass",
    "share_fake_mode",
    "specialize_phase_pass",
    "split_blocks_pass",
    "stash_unless",
    "summarize",
    "tag_attention_pass",
    "tagged",
    "untouched",
    "use_onednn_pass",
    "user_inputs",
    "value",
    "verify_axes",
    "verify_cache",
    "verify_hoist",
    "verify_marks",
    "verify_outline",
    "verify_phase",
    "verify_repeats",
    "verify_shard",
    "verify_tags",
]
