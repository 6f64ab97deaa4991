"""Noise schedules of diffusers, in the configuration of any of its schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError

# Names of schedules in diffusers and here. What is called linear here is linear in the square root of β.
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# diffusers' defaults.
BETA_START, BETA_END, BETA_SCHEDULE = 1e-4, 2e-2, "linear"


def ours(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of `DDPM` for the configuration of a scheduler.

    Args:
        config: entries of `scheduler/scheduler_config.json`.
        where: the file, for messages.

    Raises:
        UserError: the schedule or the prediction is unknown.
    """
    params: dict[str, Any] = {"timesteps": config.get("num_train_timesteps", 1000)}
    betas = config.get("trained_betas")
    if betas is not None:
        params["given_betas"] = list(betas)
    else:
        params |= _named_schedule(config, where)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f'{where}: "prediction_type" is "{prediction}"; supported are {", ".join(PREDICTIONS)}')
    if prediction != "epsilon":
        params["parameterization"] = PREDICTIONS[prediction]
    if config.get("rescale_betas_zero_snr", False):
        params["rescale_betas_zero_snr"] = True
    if config.get("timestep_spacing") == "trailing":
        params["timestep_spacing"] = "trailing"
    return params


def _named_schedule(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = config.get("beta_schedule", BETA_SCHEDULE)
    if name not in SCHEDULES:
        raise UserError(f'{where}: "beta_schedule" is "{name}"; supported are {", ".join(SCHEDULES)}')
    params = {"linear_start": config.get("beta_start", BETA_START), "linear_end": config.get("beta_end", BETA_END)}
    return params if SCHEDULES[name] == "linear" else {"beta_schedule": SCHEDULES[name], **params}


def theirs(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a `DDIMScheduler` with the published grid for parameters of `DDPM`.

    Raises:
        UserError: diffusers has no such schedule.
    """
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    schedule = params.get("beta_schedule", "linear")
    if schedule not in names:
        raise UserError(f'diffusers has no "beta_schedule" like {schedule}; it has {", ".join(names)}')
    if schedule == "cosine" and params.get("cosine_s", 8e-3) != 8e-3:
        raise UserError(f'diffusers has no cosine schedule with "cosine_s" {params["cosine_s"]}')
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    trailing = params.get("timestep_spacing") == "trailing"
    betas = params.get("given_betas")
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": params.get("timesteps", 1000) if betas is None else len(betas),
        "beta_start": params.get("linear_start", BETA_START),
        "beta_end": params.get("linear_end", BETA_END),
        "beta_schedule": names[schedule],
        "trained_betas": None if betas is None else list(betas),
        "prediction_type": predictions[params.get("parameterization", "eps")],
        "rescale_betas_zero_snr": bool(params.get("rescale_betas_zero_snr", False)),
        "timestep_spacing": "trailing" if trailing else "leading",
        "steps_offset": 0 if trailing else 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
