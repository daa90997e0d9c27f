"""Schedulers: the time-stepping of a reverse diffusion."""

from mechdiffusers.schedulers.analytic_variance import estimate_velocity_error
from mechdiffusers.schedulers.few_steps import optimize_steps
from mechdiffusers.schedulers.scheduling_predictor_corrector import PredictorCorrectorScheduler
from mechdiffusers.schedulers.scheduling_probability_flow import ProbabilityFlowScheduler
from mechdiffusers.schedulers.scheduling_vdm import VDMScheduler
from mechdiffusers.schedulers.stock import STOCK_SCHEDULERS, stock_scheduler

__all__ = [
    "STOCK_SCHEDULERS",
    "PredictorCorrectorScheduler",
    "ProbabilityFlowScheduler",
    "VDMScheduler",
    "estimate_velocity_error",
    "optimize_steps",
    "stock_scheduler",
]
