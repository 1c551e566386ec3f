"""Trains with SAELens' `LanguageModelSAETrainingRunner` on a GPT-NeoX folder; options: fp32, bf16 (autocast)."""

import argparse
import json
import logging
import time
import warnings

import numpy as np
import torch
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    __version__,
)
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights
from transformers import AutoTokenizer, GPTNeoXForCausalLM

WARM_UP, DECAY = 0.05, 0.3
"""Shares of training over which the rate rises and falls."""


def hooked(folder: str) -> HookedTransformer:
    """The model of a folder, with weights as they are."""
    model = GPTNeoXForCausalLM.from_pretrained(folder)
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=c.max_position_embeddings,
        eps=c.layer_norm_eps,
        act_fn=c.hidden_act,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=c.use_parallel_residual,
        default_prepend_bos=False,
    )
    found = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    found.load_state_dict(convert_neox_weights(model, config), strict=False)  # without masks, which are there already
    return found.eval()


def sae_config(
    args: argparse.Namespace, d_in: int, steps: int
) -> StandardTrainingSAEConfig | BatchTopKTrainingSAEConfig:
    """Of the variant, with inputs scaled as headscope scales them."""
    shared = {"d_in": d_in, "d_sae": args.d_sae, "normalize_activations": "expected_average_only_in"}
    if args.variant == "relu":
        warm_up = round(WARM_UP * steps)
        return StandardTrainingSAEConfig(**shared, l1_coefficient=args.coefficient, l1_warm_up_steps=warm_up)
    return BatchTopKTrainingSAEConfig(**shared, k=args.k)


def main() -> None:
    """Train, write the SAE, print what it took."""
    parser = argparse.ArgumentParser()
    for name in ("model", "blocks", "out", "variant", "option"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("tokens", "batch", "d_sae", "k", "layer", "buffer", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "coefficient"):
        parser.add_argument(f"--{name}", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable()
    warnings.simplefilter("ignore")
    start, used = time.perf_counter(), time.process_time()
    model, blocks = hooked(args.model), np.load(args.blocks)
    context, prompts, steps = blocks.shape[1], 32, -(-args.tokens // args.batch)
    config = LanguageModelSAERunnerConfig(
        sae=sae_config(args, model.cfg.d_model, steps),
        model_name="given",
        hook_name=f"blocks.{args.layer}.attn.hook_z",
        dataset_path="given",
        is_dataset_tokenized=True,
        prepend_bos=True,
        context_size=context,
        exclude_special_tokens=[int(blocks[0, 0])],
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch,
        store_batch_size_prompts=prompts,
        n_batches_in_buffer=args.buffer // (prompts * context),
        n_batches_for_norm_estimate=20,
        lr=args.lr,
        lr_warm_up_steps=round(WARM_UP * steps),
        lr_decay_steps=round(DECAY * steps),
        autocast=args.option == "bf16",
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=args.out,
        verbose=False,
    )
    text = Dataset.from_dict({"input_ids": blocks.astype(np.int64)})
    LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=model).run()
    took = {"seconds": time.perf_counter() - start, "processor_s": time.process_time() - used}
    print(json.dumps(took | {"version": __version__}))


if __name__ == "__main__":
    main()
