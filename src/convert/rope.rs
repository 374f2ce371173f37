//! Rotary positions: how `config.json` describes them, and how GGUF does.

use super::json::Object;
use super::plan::Plan;
use crate::error::Result;

/// Writes the base of the rotary frequencies and how they are scaled for long texts.
///
/// Checkpoints say it in `rope_theta` and `rope_scaling`, newer ones in `rope_parameters`.
pub(super) fn rope(config: &Object, head_dim: u64, plan: &mut Plan<'_>) -> Result<()> {
    let parameters = config.object("rope_parameters")?;
    let old = config.object("rope_scaling")?;
    let mut theta = None;
    for object in [parameters.as_ref(), old.as_ref(), Some(config)].into_iter().flatten() {
        theta = theta.or(object.positive("rope_theta")?);
    }
    // What checkpoints from before the key mean.
    let theta = theta.unwrap_or(10_000.0);
    // Where there are both, the old form was written for older programs and says the same.
    let scaling = parameters.or(old);
    plan.set_size("rope.dimension_count", head_dim);
    plan.set("rope.freq_base", theta as f32);

    for object in [Some(config), scaling.as_ref()].into_iter().flatten() {
        if object.positive("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            let what = "heads that are rotated whole are converted";
            return Err(object.unsupported("partial_rotary_factor", what));
        }
    }
    let Some(scaling) = scaling else { return Ok(()) };
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    match scaling.str(key)? {
        Some("default") => {}
        Some("linear") => {
            plan.set("rope.scaling.type", "linear");
            plan.set("rope.scaling.factor", scaling.need_positive("factor")? as f32);
        }
        Some("llama3") => plan.made("rope_freqs.weight", llama3(&scaling, head_dim, theta)?),
        Some("yarn") => yarn(config, &scaling, plan)?,
        // Only the base is stated.
        None if scaling.iter().all(|(key, _)| key == "rope_theta") => {}
        None => return Err(scaling.wrong(key, "`linear`, `llama3` or `yarn`")),
        Some(_) => {
            let what = "`default`, `linear`, `llama3` and `yarn` are converted";
            return Err(scaling.unsupported(key, what));
        }
    }
    Ok(())
}

/// What Llama 3.1 divides the frequency of each rotated pair by: 1 for wavelengths that the
/// training saw whole many times, `factor` for long ones, and smoothly from one to the other
/// between (the reference code of Llama 3.1, `apply_scaling`).
fn llama3(scaling: &Object, head_dim: u64, theta: f64) -> Result<Vec<f32>> {
    let factor = scaling.need_positive("factor")?;
    let low = scaling.need_positive("low_freq_factor")?;
    let high = scaling.need_positive("high_freq_factor")?;
    let context = scaling.need_size("original_max_position_embeddings")? as f64;
    if high <= low {
        return Err(scaling.wrong("high_freq_factor", "a number above low_freq_factor"));
    }
    let factors = (0..head_dim / 2).map(|i| {
        let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
        let wavelength = std::f64::consts::TAU / frequency;
        let turns = context / wavelength;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    });
    Ok(factors.collect())
}

/// YaRN (Peng et al. 2023, arXiv 2309.00071).
fn yarn(config: &Object, scaling: &Object, plan: &mut Plan<'_>) -> Result<()> {
    if scaling.bool("truncate")? == Some(false) {
        return Err(scaling.unsupported("truncate", "ramps between whole dimensions are converted"));
    }
    let context = config.need_size("max_position_embeddings")?;
    let original = scaling.size("original_max_position_embeddings")?.unwrap_or(context);
    let factor = scaling.positive("factor")?.unwrap_or(context as f64 / original as f64);
    plan.set("rope.scaling.type", "yarn");
    plan.set("rope.scaling.factor", factor as f32);
    plan.set_size("rope.scaling.original_context_length", original);
    for (key, name) in [
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ("extrapolation_factor", "rope.scaling.yarn_ext_factor"),
    ] {
        if let Some(x) = scaling.positive(key)? {
            plan.set(name, x as f32);
        }
    }
    // What queries and keys are multiplied by, together with the rotation. Readers of GGUF multiply
    // by the paper's value on their own, so that the file states what there is beside it.
    let usual = |scale: f64| if factor <= 1.0 { 1.0 } else { 1.0 + 0.1 * scale * factor.ln() };
    let stated = match scaling.positive("attention_factor")? {
        Some(stated) => Some(stated),
        None => match (scaling.positive("mscale")?, scaling.positive("mscale_all_dim")?) {
            (Some(one), Some(all)) => Some(usual(one) / usual(all)),
            _ => None,
        },
    };
    if let Some(stated) = stated.filter(|stated| (stated / usual(1.0) - 1.0).abs() > 1e-6) {
        plan.set("rope.scaling.attn_factor", (stated / usual(1.0)) as f32);
    }
    Ok(())
}
