"""What programs of the field call the columns of a run table, and the states of runs.

`COLUMN_NAMES` and the sets of states are data: a program that is missing is added there. Names are compared word by
word, in lower case and without the prefixes that trackers put before settings and results (`COLUMN_PREFIXES`), so
`summary.val/.web_loss` has the words val, web and loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

# What trackers put before the names of settings and results: Weights & Biases and MLflow, Optuna's data frame, Ray,
# Hydra and Lightning.
COLUMN_PREFIXES = (
    "config.",
    "summary.",
    "summary_metrics.",
    "summaryMetrics.",
    "json_config.",
    "params.",
    "metrics.",
    "tags.",
    "params_",
    "user_attrs_",
    "system_attrs_",
    "config/",
    "hparams.",
    "hparams/",
    "hyperparameters.",
    "hyper_parameters.",
    "train_loop_config/",
    "info/",
)

# For each column of the run table: names, with units after a colon and, in braces, the programs that write them; the
# most specific first. The words of a name are joined by underscores, whatever joins them in the file.
COLUMN_NAMES: dict[str, str] = {
    "N": """
        params_active_precise{Gemstones} num_scaling_params{nanochat} scaling_params
        params{Porian et al., Marin} n_params{nanochat}
        num_params{torchtitan, W&B} nparams{torchtitan} model_num_params{torchtitan} num_parameters{Hugging Face}
        model_num_parameters{Hugging Face} parameters n_parameters parameter_count{Marin} param_count params_count
        num_trainable_params{Lightning} trainable_params{Lightning, Keras} trainable_parameters active_params
        params_active{Gemstones} num_active_params{OLMo} nonembedding_params:nonembedding-as-is
        non_embedding_params:nonembedding-as-is{OLMo} num_non_embedding_params:nonembedding-as-is{OLMo}
        params_no_embedding:nonembedding-as-is params_non_embedding:nonembedding-as-is
        n_non_embedding:nonembedding-as-is n_no_embedding:nonembedding-as-is n_no_emb:nonembedding-as-is
        n_nonemb:nonembedding-as-is total_params:total-as-is{OLMo, NeMo} params_total:total-as-is
        num_total_params:total-as-is{OLMo} total_parameters:total-as-is n_params_total:total-as-is model_params
        model_parameters model_size size n
    """,
    "D": """
        tokens{Porian et al., Marin} n_tokens num_tokens total_tokens{OLMo}
        throughput_total_tokens{OLMo, Levanter} total_training_tokens train_tokens training_tokens
        num_train_tokens token_count tokens_seen n_tokens_seen{torchtitan} ntokens_seen{torchtitan}
        num_tokens_seen total_tokens_seen{nanochat} num_input_tokens_seen{Hugging Face}
        consumed_tokens{Megatron, NeMo} tokens_consumed tokens_trained dataset_tokens data_size d
        consumed_train_samples:sequences{Megatron} consumed_samples:sequences{Megatron, NeMo}
        num_sequences:sequences sequences_seen:sequences train_global_step:steps{Hugging Face in W&B}
        trainer_global_step:steps{Lightning in W&B} global_step:steps{Lightning, Hugging Face} train_steps:steps
        training_steps:steps num_train_steps:steps{Levanter} trained_steps:steps n_steps:steps num_steps:steps
        total_steps:steps train_iters:steps{Megatron} num_iterations:steps{llm.c, nanochat}
        num_updates:steps{fairseq} step:steps{nanoGPT, Lightning, Hugging Face} steps:steps iter:steps{nanoGPT}
        iters:steps iteration:steps{Megatron} iterations:steps iter_num:steps{nanoGPT} update:steps updates:steps
        max_iters:steps{nanoGPT} max_steps:steps{Lightning, Hugging Face} lr_decay_iters:steps{nanoGPT}
        training_iteration:steps{Ray} tokens_per_param:per-parameter tokens_per_parameter:per-parameter
        tokens_to_params:per-parameter token_param_ratio:per-parameter tokens_params_ratio:per-parameter
        tok_per_param:per-parameter tpp:per-parameter chinchilla_ratio:per-parameter
        target_param_data_ratio:per-parameter{nanochat} param_data_ratio:per-parameter{nanochat} flops:flops
        flops_budget:flops training_flops:flops training_flop:flops flop:flops total_flop:flops
        train_flops:flops total_flops:flops{Levanter} total_training_flops:flops{nanochat}
        total_flos:flops{Hugging Face} compute:flops compute_budget:flops c:flops
    """,
    "loss": """
        val_loss{Lightning, Keras, nanoGPT} eval_loss{Hugging Face, Levanter} valid_loss validation_loss loss_val
        loss_eval loss_valid loss_validation val_loss_epoch{Lightning} val_loss_step{Lightning} final_val_loss
        final_eval_loss lm_loss_validation{Megatron} validation_lm_loss{Megatron} validation_loss_lm{Megatron}
        heldout_loss
        dev_loss test_loss eval_paloma_c4_en_loss{Marin} eval_cross_entropy_loss{OLMo} eval_ce_loss{OLMo}
        val_cross_entropy val_ce val_nll eval_nll nll tel{llm.c} final_loss{Porian et al.} loss_final smooth_loss
        value{Optuna} objective loss lm_loss{Megatron, NeMo} cross_entropy cross_entropy_loss ce_loss
        val_bits_per_token:bits bits_per_token:bits val_ppl:perplexity eval_ppl:perplexity
        val_perplexity:perplexity{NeMo} eval_perplexity:perplexity{OLMo} perplexity:perplexity ppl:perplexity
        val_bpb:bits-per-byte{nanochat} eval_bpb:bits-per-byte{Levanter} bpb:bits-per-byte
        val_bits_per_byte:bits-per-byte bits_per_byte:bits-per-byte bits_per_char:bits-per-byte
        bits_per_character:bits-per-byte bpc:bits-per-byte negative_log_likelihood neg_log_likelihood
        log_likelihood:log-likelihood loglikelihood:log-likelihood val_log_likelihood:log-likelihood
        test_log_likelihood:log-likelihood logprob:log-likelihood log_prob:log-likelihood
        train_loss{Lightning} train_loss_epoch{Lightning} train_loss_step{Lightning} training_loss loss_train
        reduced_train_loss{NeMo} train_cross_entropy_loss{OLMo} train_ce_loss{OLMo}
        loss_metrics_global_avg_loss{torchtitan} trl{llm.c}
    """,
    "lr": """
        peak_lr lr_peak peak_learning_rate learning_rate_peak max_lr lr_max max_learning_rate
        learning_rate{Hugging Face, nanoGPT, Keras} lr base_lr lr_base{Gemstones} base_learning_rate init_lr
        initial_lr matrix_lr{nanochat} optim_learning_rate{Levanter} optimizer_lr{torchtitan} optim_lr{NeMo}
        lr_adamw{Lightning} lr_adam{Lightning} lr_sgd{Lightning} lr_adamw_pg1{Lightning}
        optim_learning_rate_group0{OLMo} learning_rate_group0{OLMo} lr_group_0 lrate eta
    """,
    "batch_tokens": """
        tokens_per_step tokens_per_batch tokens_per_iter{nanoGPT} tokens_per_update batch_size_tokens
        batch_size_in_tokens{OLMo} global_batch_size_tokens global_batch_tokens tokens_batch
        total_batch_size{llm.c, nanochat} global_batch_size:sequences{Megatron, NeMo, torchtitan, OLMo}
        global_train_batch_size:sequences{OLMo} total_train_batch_size:sequences{Hugging Face}
        effective_batch_size:sequences train_batch_size:sequences{Levanter, Hugging Face} batch_size:sequences
        batch_seqs:sequences batch_sequences:sequences batch:sequences bs:sequences bsz:sequences gbs:sequences
    """,
    "seq_len": """
        sequence_length{Gemstones} seq_length{Megatron} train_seq_len{Levanter} max_seq_len{nanochat}
        max_seq_length{Hugging Face} max_sequence_length{OLMo} max_length context_length context_len ctx_len
        block_size{nanoGPT} seqlen seq encoder_seq_length{NeMo} n_ctx n_positions{Hugging Face}
        max_position_embeddings{Hugging Face}
    """,
    "run_id": """
        run_id{MLflow} run trial_id{Ray} id{W&B} run_name run_uuid{MLflow} experiment_id experiment_name exp_name
        exp_id experiment exp job_id{SLURM} jobid{SLURM} name{W&B} trial number{Optuna}
    """,
    "bytes_per_token": """
        bytes_per_token token_bytes avg_bytes_per_token
    """,
}
# Weights & Biases counts its calls in `_step`, which need not be steps of training, so the program's own count of steps
# comes first.
COUNTER = re.compile(r"(^|[./])_step$")
LEAST_SPECIFIC = 99
# Columns with these names name runs even if each run has few rows. Others may name models or sweeps.
RUN_NAMES = frozenset({"run_id", "run", "trial_id", "id", "run_name", "run_uuid", "exp_id", "experiment_id"})
# Words of a number of tokens or steps that grows along a run.
PROGRESS_WORDS = frozenset(
    {"seen", "consumed", "step", "steps", "iter", "iteration", "iterations", "update", "updates"}
)
# Words that, together, make a column one that an unknown program may have named: any of the first, none of the second.
COLUMN_WORDS: dict[str, tuple[str, str]] = {
    "N": (
        "params param parameters parameter nparams mparams gparams bparams",
        "per lr group norm tokens token tok embedding emb embed ratio",
    ),
    "D": (
        "tokens token toks gtokens mtokens ntokens btokens",
        "per sec second loss acc accuracy batch vocab throughput time max budget position rate param params id ids eos "
        "bos pad special limit size gpu device",
    ),
    "D:steps": (
        "step steps iter iters iteration iterations",
        "per time sec second size warmup save saving eval evaluation log logging interval every accumulation decay "
        "tokens token loss ppl perplexity bpb acc accuracy grad norm speed ms s",
    ),
    "D:flops": (
        "flops flop flos",
        "per sec second s token param params utilization mfu promised gpu device hardware achieved tflops rate step",
    ),
    "loss": (
        "loss losses nll xent ce ppl perplexity bpb bpc bpt",
        "aux z lb balancing balance router scale scaler l2 reg regularization kl best min max std var sd sem acc "
        "accuracy coef coefficient weight type name fn function ema grad step steps iter spike",
    ),
    "lr": (
        "lr lrate learningrate",
        "min final end decay warmup scheduler schedule iters steps mult multiplier ratio factor type embedding "
        "unembedding emb scalar head style policy fraction frac",
    ),
    "batch_tokens": (
        "batch bs batchsize",
        "micro per device eval val valid test norm num n idx index mini gpu time loss ramp rampup",
    ),
}
EMBEDDING_WORDS = frozenset({"embedding", "emb", "embed", "embeddings"})
HELD_OUT_WORDS = frozenset({"val", "eval", "valid", "validation", "heldout", "dev", "test", "evaluation"})
TRAINING_WORDS = frozenset({"train", "training", "trl"})
# What the words of a column, or the text in its parentheses, say about its unit.
SCALE_WORDS = {
    "thousands": frozenset({"k", "thousand", "thousands"}),
    "millions": frozenset({"m", "million", "millions", "mil", "mio", "mparams", "mtokens"}),
    "billions": frozenset({"b", "bn", "g", "billion", "billions", "bil", "gtokens", "btokens", "bparams", "gparams"}),
    "trillions": frozenset({"t", "trillion", "trillions", "ttokens"}),
}
LOSS_UNIT_WORDS = {
    "perplexity": frozenset({"ppl", "perplexity", "pplx", "perp"}),
    "bits-per-byte": frozenset({"bpb", "bpc", "bits_per_byte", "bits_per_char", "bits_per_character", "bits/byte"}),
    "bits": frozenset({"bits", "bit", "bpt", "bits_per_token", "bits/token", "shannon", "shannons"}),
    "nats": frozenset({"nats", "nat", "nats_per_token"}),
}

# The state of a run, in lower case, with underscores, and without the name of an enumeration.
FINISHED_STATES = ("finished", "completed", "complete", "done", "success", "succeeded", "terminated", "published")
UNFINISHED_STATES = (
    "running",
    "crashed",
    "failed",
    "killed",
    "scheduled",
    "pending",
    "preempted",
    "preempting",
    "cancelled",
    *("pruned", "fail", "waiting", "error", "errored", "paused", "failure"),
    *("timeout", "timed_out", "out_of_memory", "oom", "memout", "node_fail", "boot_fail", "deadline"),
    *("suspended", "requeued", "requeue_hold", "completing", "configuring", "resizing", "revoked", "stopping"),
    *("stopped", "early_stopped", "earlystopped", "aborted", "abandoned", "interrupted", "queued", "created"),
    *("starting", "initializing", "initialized", "in_progress", "inprogress", "unfinished", "incomplete", "invalid"),
    *("canceled", "canceling", "cancelling", "user_canceled", "sys_canceled", "candidate", "staged", "dispatched"),
    *("lost", "crash", "unknown", "exited", "idle", "restarting", "unfinished", "active", "submitted", "evicted"),
)
DIVERGED_STATES = ("diverged", "nan", "exploded", "divergence")
# SLURM's short codes, read only where a column holds nothing else.
SHORT_STATES = {
    "cd": "completed",
    "f": "failed",
    "to": "timeout",
    "ca": "cancelled",
    "oom": "out_of_memory",
    "nf": "node_fail",
    "pr": "preempted",
    "pd": "pending",
    "r": "running",
    "bf": "boot_fail",
    "dl": "deadline",
    "s": "suspended",
}
# Enumerations that are sometimes exported as numbers.
NUMBERED_STATES = {
    "Optuna": {"0": "running", "1": "complete", "2": "pruned", "3": "fail", "4": "waiting"},
    "MLflow": {"1": "running", "2": "scheduled", "3": "finished", "4": "failed", "5": "killed"},
}
STATE_NAMES = (
    "state",
    "status",
    "run_state",
    "run_status",
    "trial_state",
    "trial_status",
    "job_state",
    "job_status",
)


@cache
def read_names(name: str) -> tuple[tuple[str, str, str], ...]:
    """Return the known names of a column of the run table, its own first, as (name, unit, programs)."""
    found = re.findall(r"(\w+)(?::([\w-]+))?(?:\{([^}]*)\})?", COLUMN_NAMES.get(name, ""))
    return ((name.lower(), "", ""), *found)


def find_prefix(column: str) -> str:
    """Return the prefix of a tracker with which a column's name begins; empty if there is none."""
    return next((p for p in COLUMN_PREFIXES if column.startswith(p) and len(column) > len(p)), "")


def strip_prefix(column: str) -> str:
    """Return the name of a column without the prefixes of trackers, such as "lr" for "config.lr"."""
    while prefix := find_prefix(column):
        column = column.removeprefix(prefix)
    return column


def split_words(column: str, *, strip: bool = True) -> list[list[str]]:
    """Return the words of each part of a column's path, in lower case, without what is in parentheses.

    Args:
        column: A name such as "summary.val/.webLoss (nats)".
        strip: Whether to leave out the prefixes of trackers.

    Returns:
        One list of words for each part that dots or slashes separate, such as [["val"], ["web", "loss"]].
    """
    name = re.sub(r"[(\[][^)\]]*[)\]]", " ", strip_prefix(column) if strip else column)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name)
    parts = re.split(r"[./:|>]+", name)
    words = [[w for w in re.split(r"[^0-9A-Za-z]+", part.lower()) if w] for part in parts]
    return [part for part in words if part]


def find_bracketed(column: str) -> list[str]:
    """Return the texts in parentheses or brackets of a column's name, in lower case, such as ["m"] for "Params (M)"."""
    return [text.strip().lower() for text in re.findall(r"[(\[]([^)\]]*)[)\]]", column)]


def rank_column(name: str, column: str) -> tuple[tuple[int, int, int], str, str] | None:
    """Return how well a column's name fits a column of the run table; the lowest rank fits best.

    Args:
        name: A key of `COLUMN_NAMES`.
        column: The column of the source.

    Returns:
        (rank, unit, reason): the rank, the unit that the known name implies (may be empty), and a phrase that says why.
        None if nothing speaks for it.
    """
    if name == "D" and COUNTER.search(column):
        # After all names of steps done, and before those of planned steps.
        last_done = [known for known, _, _ in read_names("D")].index("updates")
        return (0, last_done, LEAST_SPECIFIC), "steps", "named as in W&B"
    stripped = _rank_words(name, split_words(column))
    ranks = [stripped] if stripped else []
    # "params_active" of one program is "active" of another that puts params_ before its settings, so a whole name that
    # is known counts at every stage.
    while True:
        ranked = _rank_words(name, split_words(column, strip=False))
        is_known = ranked is not None and ranked[0][0] in ((0, 1, 4) if name == "loss" else (0,))
        if ranked is not None and is_known and ranked[0][2] == 1:
            ranks.append(ranked)
        prefix = find_prefix(column)
        if not prefix:
            return min(ranks, default=None)
        column = column.removeprefix(prefix)


def _rank_words(name: str, parts: Sequence[Sequence[str]]) -> tuple[tuple[int, int, int], str, str] | None:
    """Return what `rank_column` returns, for the words of a column."""
    if not parts:
        return None
    whole = "_".join(word for part in parts for word in part)
    tails = ["_".join(word for part in parts[k:] for word in part) for k in range(len(parts))]
    best: tuple[tuple[int, int, int], str, str] | None = None
    for index, (known, unit, programs) in enumerate(read_names(name)):
        if known not in tails:
            continue
        # A single letter below other names is something else, such as a coefficient.
        if len(known) == 1 and known != whole:
            continue
        reason = f"named as in {programs}" if programs else "a common name"
        rank = (0, index, len(parts))
        if best is None or rank < best[0]:
            best = (rank, unit, reason)
    if best is not None:
        return _demote_training_loss(name, parts, best)
    words = {word for part in parts for word in part}
    for key in [name, *(k for k in COLUMN_WORDS if k.startswith(f"{name}:"))]:
        needed, forbidden = COLUMN_WORDS.get(key, ("", ""))
        hits = sorted(words & set(needed.split()))
        if not hits and name == "lr" and {"learning", "rate"} <= words:
            hits = ["learning rate"]
        is_nonembedding = name == "N" and bool(words & {"non", "nonembedding", "without", "no"})
        if hits and not (words - (EMBEDDING_WORDS if is_nonembedding else set())) & set(forbidden.split()):
            unit = key.partition(":")[2]
            if name == "N" and (is_nonembedding or "total" in words):
                unit = "nonembedding-as-is" if is_nonembedding else "total-as-is"
            # A loss in nats needs no conversion.
            is_converted = name == "loss" and not words & {"loss", "losses", "nll", "xent", "ce"}
            rank = (1 if ":" not in key else 2, len(words) + 10 * is_converted, len(parts))
            return _demote_training_loss(name, parts, (rank, unit, f"its name contains {hits[0]!r}"))
    return None


def _demote_training_loss(
    name: str, parts: Sequence[Sequence[str]], found: tuple[tuple[int, int, int], str, str]
) -> tuple[tuple[int, int, int], str, str]:
    """Return the rank of a loss, with one of held-out data before others and one of training data last."""
    if name != "loss":
        return found
    (tier, index, depth), unit, reason = found
    words = {word for part in parts for word in part}
    if words & TRAINING_WORDS and not words & HELD_OUT_WORDS:
        return (tier + 4, index, depth), unit, f"{reason}, of training data"
    if words & HELD_OUT_WORDS:
        return (0, index if tier == 0 else 50 + index, depth), unit, f"{reason}, of held-out data"
    return (tier + 1, index, depth), unit, reason
