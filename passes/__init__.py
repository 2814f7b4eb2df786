"""The passes, one a file: functions from graph to graph, in the order of :mod:`pabc.pipeline`."""

from .axes import name_axes_pass, verify_axes
from .blocks import split_blocks_pass
from .cache import cache_read, cache_write, compute_unless, insert_cache_pass, verify_cache
from .canonicalize import canonicalize_pass
from .capture import Signature, bind_arguments, bind_call, capture
from .emit import Code, compile_blocks, example_inputs, prepare_inductor, run_blocks
from .encode import CacheDtype, encode_cuts_pass
from .enlarge import enlarge_call
from .flatten import Place, inline_regions_pass, lift_weights_pass
from .flops import FlopCounter
from .hoist import Part, hoist_invariants_pass, part_of_prologue, verify_hoist
from .ir import Attention, Axis, Factor, Region
from .lower import Kernels, Lowering, lower_pass, summarize
from .offload import offload_cuts_pass
from .onednn import lowering_onednn, use_onednn_pass
from .outline import outline_regions_pass, verify_outline
from .regions import Cut, mark_regions_pass, verify_marks
from .repeats import first_copies, keep_unrepeated_pass, verify_repeats
from .rewrites import rewrite_formulas_pass
from .shard import Sharded, shard_batch_pass, shard_pass, verify_shard
from .sharding.moves import Collective, find_collectives
from .sharding.places import Ranks
from .sharding.sharder import Output
from .specialize import specialize_phase_pass, verify_phase
from .tag import tag_attention_pass, tagged, verify_tags
from .tracing.assumptions import Reads
from .tracing.calls import pack
from .tracing.effects import delete_arguments
from .tracing.fakes import share_fake_mode
from .tracing.hooks import HookCall
from .tracing.outside import OutsideCall
from .tracing.records import Read
from .tracing.sizes import Sizes, concrete, fold_sizes, hinted

__all__ = [
    "Attention",
    "Axis",
    "CacheDtype",
    "Code",
    "Collective",
    "Cut",
    "Factor",
    "FlopCounter",
    "HookCall",
    "Kernels",
    "Lowering",
    "Output",
    "OutsideCall",
    "Part",
    "Place",
    "Ranks",
    "Read",
    "Reads",
    "Region",
    "Sharded",
    "Signature",
    "Sizes",
    "bind_arguments",
    "bind_call",
    "cache_read",
    "cache_write",
    "canonicalize_pass",
    "capture",
    "compile_blocks",
    "compute_unless",
    "concrete",
    "delete_arguments",
    "encode_cuts_pass",
    "enlarge_call",
    "example_inputs",
    "find_collectives",
    "first_copies",
    "fold_sizes",
    "hinted",
    "hoist_invariants_pass",
    "inline_regions_pass",
    "insert_cache_pass",
    "keep_unrepeated_pass",
    "lift_weights_pass",
    "lower_pass",
    "lowering_onednn",
    "mark_regions_pass",
    "name_axes_pass",
    "offload_cuts_pass",
    "outline_regions_pass",
    "pack",
    "part_of_prologue",
    "prepare_inductor",
    "rewrite_formulas_pass",
    "run_blocks",
    "shard_batch_pass",
    "shard_pass",
    "share_fake_mode",
    "specialize_phase_pass",
    "split_blocks_pass",
    "summarize",
    "tag_attention_pass",
    "tagged",
    "use_onednn_pass",
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
