"""A model in a pipeline of stages, on paper.

What each stage computes, keeps and sends for a micro-batch under a rule, and a simulation of a step, exact
for its assumptions: forward and backward tasks on the stages, transfers on the links between them, in the
order of a schedule. Nothing is trained or measured here; rates that were measured may go in.
"""

from localgpt_core.pipelines.machines import Pipeline
from localgpt_core.pipelines.simulation import PipelineStep, simulate
from localgpt_core.pipelines.stages import layers_per_stage, measured_flops_per_s
from localgpt_core.pipelines.tables import link_rows, paper_config, pipeline_rows

__all__ = [
    "Pipeline",
    "PipelineStep",
    "layers_per_stage",
    "link_rows",
    "measured_flops_per_s",
    "paper_config",
    "pipeline_rows",
    "simulate",
]
