"""Compiles whole diffusers pipelines, without importing diffusers."""

from pabc.pipelines.compiled_pipeline import CompiledPipeline, compile_pipeline

__all__ = ["CompiledPipeline", "compile_pipeline"]
