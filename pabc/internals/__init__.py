"""What pabc uses of PyTorch that PyTorch does not promise to keep, one module a subject.

Each module names what it uses, what for, and since which release of PyTorch that is there; "2.6"
stands for 2.6 or earlier. Where a release lacks something, importing the module raises an
ImportError that tells which releases have it. A feature imports its module before it starts.

    module       what it is about                               who needs it
    release      the releases that pabc is tested with          all of these modules
    pytree       nested containers                              all of pabc
    fakes        fake tensors                                   capture, FLOPs, artifacts
    dispatch     modes, dispatch keys, autocast                 capture, calls under autocast
    ops          operators and their schemas                    all of pabc
    tensors      versions and subclasses of tensors             capture, runtime
    modules      what `torch.nn.Module` holds                   capture, runtime
    graphs       `torch.fx` graphs                              passes
    dynamo       the compiler's lock, versions of dictionaries  capture, runtime
    inductor     Inductor                                       `backend="inductor"`
    onednn       oneDNN's projection, and Inductor's code       `backend="inductor"` on a CPU
    kernels      code of Inductor, without Inductor             `load`
    aotinductor  AOTInductor                                    `save`, `load`, on a GPU
    collectives  collective ops, process groups                 `mesh=`

Some names begin with an underscore and may stand elsewhere: ops of ATen (`aten._to_copy`), which
exported programs consist of; `torch._check`, which the documentation of torch.export asks users to
call; `_orig_mod`, which pabc's own modules have, as those of torch.compile do; and
`_load_from_state_dict`, a method that subclasses of `torch.nn.Module` override.
"""
