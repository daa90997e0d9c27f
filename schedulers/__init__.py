"""Schedulers: the time-stepping of a reverse diffusion."""

from mechdiffusers.schedulers.stock import STOCK_SCHEDULERS, stock_scheduler

__all__ = ["STOCK_SCHEDULERS", "stock_scheduler"]
