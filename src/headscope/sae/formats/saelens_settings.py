"""Settings in a SAELens `cfg.json`: those that are read, those of training alone, and no others.

An unknown setting may change what the SAE computes, so it is rejected by name unless it is off.
"""

from headscope.sae.formats.files import Files, Json, unsupported

_READ = """
architecture d_in d_sae k activation_fn activation_fn_kwargs apply_b_dec_to_input normalize_activations
rescale_acts_by_decoder_norm reshape_activations hook_name hook_name_out hook_head_index hook_head_index_out d_out
metadata
"""

_OF_THE_MODEL = """
model_name model_class_name model_kwargs model_from_pretrained_kwargs hook_eval hook_layer hook_point_layer
hf_hook_name neuronpedia_id prepend_bos exclude_special_tokens context_size seqpos_slice dataset_path
dataset_trust_remote_code is_dataset_tokenized streaming disable_concat_sequences sequence_separator_token
use_chat_formatting sae_lens_version sae_lens_training_version
"""
"""Which activations the SAE is of; the relevant ones are read as metadata."""

_OF_TRAINING = """
sae dtype device seed verbose logger output_path resume resume_from_checkpoint from_pretrained_path checkpoint_path
n_checkpoints save_final_checkpoint autocast autocast_lm compile_llm llm_compilation_mode compile_sae llm_device
sae_compilation_mode act_store_device activations_mixing_fraction prefetch_llm_batches n_batches_in_buffer
n_batches_for_norm_estimate store_batch_size store_batch_size_prompts tokens_per_buffer use_cached_activations
cached_activations_path training_tokens total_training_tokens finetuning_tokens finetuning_method
finetuning_scaling_factor train_batch_size train_batch_size_tokens adam_beta1 adam_beta2 lr lr_scheduler_name
lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles b_dec_init_method expansion_factor decoder_init_norm
decoder_orthogonal_init decoder_heuristic_init decoder_heuristic_init_norm init_encoder_as_decoder_transpose
normalize_sae_decoder noise_scale mse_loss_normalization scale_sparsity_penalty_by_decoder_norm l1_coefficient
l1_warm_up_steps lp_norm l0_coefficient l0_warm_up_steps target_l0 aux_loss_coefficient pre_act_loss_coefficient
jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input
topk_threshold_lr use_sparse_activations matryoshka_widths use_matryoshka_aux_loss use_ghost_grads
feature_sampling_window feature_sampling_method feature_reinit_scale resample_batches dead_feature_window
dead_feature_threshold dead_feature_estimation_method n_eval_batches eval_batch_size_prompts n_eval_seqs log_to_wandb
log_activations_store_to_wandb log_optimizer_state_to_wandb log_weights_to_wandb wandb_project wandb_entity wandb_id
wandb_log_frequency eval_every_n_wandb_logs run_name
"""
"""Settings of training and of speed, which do not affect what the SAE computes."""

KNOWN = frozenset(f"{_READ} {_OF_THE_MODEL} {_OF_TRAINING}".split())
"""Names of settings, in the terms of version 6."""


def check_settings(files: Files, config: Json, metadata: Json) -> None:
    """Reject settings that change the computation and are not supported.

    Args:
        files: for the message.
        config: in the terms of version 6, with a supported architecture.
        metadata: of the same file.

    Raises:
        SAEError: there is such a setting.
    """
    unknown = sorted(name for name, value in config.items() if name not in KNOWN and not _is_off(value))
    if unknown:
        raise unsupported(
            files,
            f"cfg.json says {', '.join(f'{name} {config[name]!r:.60}' for name in unknown)}",
            expected="settings whose meaning is known: those that SAELens 3 to 6 writes",
            do="take out of cfg.json what plays no part in what the SAE computes, or use another SAE",
        )
    _check_activation(files, config)
    _check_place(files, config, metadata)
    _check_input(files, config)


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _check_activation(files: Files, config: Json) -> None:
    architecture = config["architecture"]
    own = "topk" if architecture == "topk" else "relu"
    for name, expected in (("activation_fn", own), ("activation_fn_kwargs", {"k": config.get("k")})):
        if not _is_off(config.get(name)) and config[name] != expected:
            raise unsupported(files, f"{name} {config[name]!r}", expected=f"{own}, as {architecture!r} has")


def _check_place(files: Files, config: Json, metadata: Json) -> None:
    """Reject an SAE of one head, and one that reconstructs an activation other than its input."""
    head = metadata.get("hook_head_index")
    if head is not None:
        raise unsupported(files, f"an SAE of head {head} alone", expected="one of all heads, concatenated")
    said = config | metadata
    for name, own in (("hook_name_out", "hook_name"), ("hook_head_index_out", "hook_head_index"), ("d_out", "d_in")):
        if said.get(name) not in (None, said.get(own)):
            raise unsupported(
                files,
                f"{name} {said[name]!r}, a transcoder: it predicts another activation than it reads",
                expected=f"{own}, {said.get(own)!r}: an SAE, which reconstructs what it reads",
            )


def _check_input(files: Files, config: Json) -> None:
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", "expected_average_only_in"):
        known = {
            "layer_norm": "each input is divided by its own standard deviation",
            "constant_norm_rescale": "each input is divided by its own norm",
            "covariance_whitening": "the whitening matrix has not been folded into the weights",
        }
        raise unsupported(
            files,
            f"normalize_activations {normalised!r}" + (f": {known[normalised]}" if normalised in known else ""),
            expected="'none' or 'expected_average_only_in': pre-activations linear in the activations of the model",
            do="fold the normalisation into the weights where that can be done, or use another SAE",
        )
    reshape = config.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise unsupported(files, f"reshape_activations {reshape!r}", expected="'none' or 'hook_z'")
