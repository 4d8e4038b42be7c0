"""Instruments: what training does to a model, measured while it goes on. Each name loads its module on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.diagnose.adapters import SpectrumTracker as SpectrumTracker
    from burnish.diagnose.adapters import adapter_spectra as adapter_spectra
    from burnish.diagnose.directions import Alignment as Alignment
    from burnish.diagnose.directions import covariance_alignment as covariance_alignment
    from burnish.diagnose.directions import expected_alignment as expected_alignment
    from burnish.diagnose.directions import intrinsic_dimension as intrinsic_dimension
    from burnish.diagnose.directions import quadratic_course as quadratic_course
    from burnish.diagnose.directions import sampled_alignment as sampled_alignment
    from burnish.diagnose.directions import stable_rank as stable_rank
    from burnish.diagnose.directions import subspace_share as subspace_share
    from burnish.diagnose.eigenpairs import Eigenpairs as Eigenpairs
    from burnish.diagnose.eigenpairs import top_eigenpairs as top_eigenpairs
    from burnish.diagnose.factors import Factorization as Factorization
    from burnish.diagnose.factors import Trajectory as Trajectory
    from burnish.diagnose.factors import descend as descend
    from burnish.diagnose.factors import flow as flow
    from burnish.diagnose.hessian import hessian_vector_product as hessian_vector_product
    from burnish.diagnose.hessian import loss_gradient as loss_gradient
    from burnish.diagnose.noise import SignalAndNoise as SignalAndNoise
    from burnish.diagnose.noise import signal_and_noise as signal_and_noise
    from burnish.diagnose.projection import ProjectedTraining as ProjectedTraining
    from burnish.diagnose.recorder import SubspaceMeasurement as SubspaceMeasurement
    from burnish.diagnose.recorder import SubspaceRecorder as SubspaceRecorder
    from burnish.diagnose.spectrum import AdapterSpectrum as AdapterSpectrum
    from burnish.diagnose.spectrum import effective_rank as effective_rank
    from burnish.diagnose.spectrum import growth_rates as growth_rates
    from burnish.diagnose.spectrum import growth_variation as growth_variation
    from burnish.diagnose.spectrum import hit_order as hit_order
    from burnish.diagnose.spectrum import hit_steps as hit_steps
    from burnish.diagnose.spectrum import lora_singular_values as lora_singular_values
    from burnish.diagnose.subspace import alignment as alignment
    from burnish.diagnose.subspace import bulk as bulk
    from burnish.diagnose.subspace import bulk_share as bulk_share
    from burnish.diagnose.subspace import dominant as dominant
    from burnish.diagnose.update import update_of as update_of

NAMES = {
    "AdapterSpectrum": "spectrum",
    "effective_rank": "spectrum",
    "growth_rates": "spectrum",
    "growth_variation": "spectrum",
    "hit_order": "spectrum",
    "hit_steps": "spectrum",
    "lora_singular_values": "spectrum",
    "SpectrumTracker": "adapters",
    "adapter_spectra": "adapters",
    "Factorization": "factors",
    "Trajectory": "factors",
    "descend": "factors",
    "flow": "factors",
    "Alignment": "directions",
    "covariance_alignment": "directions",
    "expected_alignment": "directions",
    "intrinsic_dimension": "directions",
    "quadratic_course": "directions",
    "sampled_alignment": "directions",
    "stable_rank": "directions",
    "subspace_share": "directions",
    "Eigenpairs": "eigenpairs",
    "top_eigenpairs": "eigenpairs",
    "hessian_vector_product": "hessian",
    "loss_gradient": "hessian",
    "SignalAndNoise": "noise",
    "signal_and_noise": "noise",
    "ProjectedTraining": "projection",
    "SubspaceMeasurement": "recorder",
    "SubspaceRecorder": "recorder",
    "alignment": "subspace",
    "bulk": "subspace",
    "bulk_share": "subspace",
    "dominant": "subspace",
    "update_of": "update",
}
"""Public name -> the module of this package that holds it."""

__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(importlib.import_module(f"burnish.diagnose.{NAMES[name]}"), name)
    raise AttributeError(f"module 'burnish.diagnose' has no attribute {name!r}")
