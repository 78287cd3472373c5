"""The signals that a verb may name as its arguments, and where each may be named.

>>> SIGNALS["mask"]
'tokens (for a CacheCompressor: entries) that are real, neither padding nor filler, (b m) bool'
>>> "logits" in SIGNALS and "logits" not in OF_THE_CACHE  # a compressor looks at no head
True
"""

from __future__ import annotations

SIGNALS: dict[str, str] = {
    "hidden": "the tokens of the stream at this site, (b m d)",
    "queries": "queries of this block's self-attention, rotated, (b h m e)",
    "keys": "keys of this block's self-attention, rotated, (b k m e); for a CacheCompressor all cached keys",
    "values": "values of this block's self-attention, (b k m e); for a CacheCompressor all cached values",
    "scores": "attention probabilities of this block without the matrix: an object with .columns(), .rows(index) and .of_last(window)",
    "mask": "tokens (for a CacheCompressor: entries) that are real, neither padding nor filler, (b m) bool",
    "sizes": "how many original tokens stand in each token (for a CacheCompressor: entry, also (b k n)), (b m)",
    "positions": "place of each token (for a CacheCompressor: entry) in the given sequence, from 0 at the first real one, (b m)",
    "fresh": "tokens that a TokenBank inserted, or that a model itself has behind its patches to answer with, (b m) bool",
    "plain": "tokens of each row that are real, neither special in front nor inserted, int, where that is known without a look; else None",
    "prefix": "number of special tokens (class, distillation, registers) in front of a vision stream, int",
    "visual": "tokens that come from an image or a video, (b m) bool",
    "pictures": "for each size the tokens of its pictures and videos, a list of indices (p t h w) into the (b m) laid end to end",
    "pictured": "visual tokens of the sequence as they entered the stream, which are there, and at which of `positions` their pictures "
    "begin, ((b v d), (b v) bool, (b v))",
    "instruction": "real text tokens behind the last visual token, (b m) bool",
    "attention_input": "what this block's self-attention is given for each token, behind the norm, (b m d)",
    "attention_output": "what this block's self-attention returned for each token, before the residual is added, (b m d)",
    "mlp_input": "what this block's MLP is given for each token, behind the norm, (b m d)",
    "mlp_output": "what this block's MLP returned for each token, before the residual is added, (b m d)",
    "influence": "for a FeatureCache: what each token gave in the self-attention that was last computed whole, mean over heads, (b n)",
    "doubt": "for a FeatureCache: entropy of the heads' mean cross-attention of each token when it was last computed whole, or None, (b n)",
    "shared_doubt": "for a FeatureCache: the same of the mean of both halves of a batch under guidance, else as `doubt`",
    "age": "for a FeatureCache: steps since each token of this sublayer was computed, 1 for the step before, (b n)",
    "grid": "height and width of the picture in tokens, special ones in front left out; (1, n) where there is none, None where unknown",
    "downsampling": "of a denoiser: how many times as wide and high tokens are as in the first stream that asks in this call, int",
    "noise": "what the denoiser put out for each token at the step before; None at the first, or where it lies otherwise, (b n f)",
    "contrast": "what the condition changed in that, by the two halves or calls of guidance; None without them, (b n f)",
    "guidance": "how much that is, its norm; None likewise, (b n)",
    "kind": "kind of the stream: text, vision, audio, denoiser, ..., str",
    "layer": "index of the block in its stream, int",
    "layers": "number of blocks in the stream, int",
    "part": "what is at hand of a FeatureCache: attention, cross_attention or mlp; block where it reuses whole ones, str",
    "step": "index of the denoising step, int",
    "steps": "number of denoising steps, int, or None where the pipeline does not give it",
    "remaining": "number of denoising steps behind this one, int, or None where that is not known",
    "time_embedding": "for a FeatureCache of a stack: what its first block is given of the timestep, (b ...)",
    "timestep": "timestep of the denoising step as the model was given it, Tensor or None",
    "time": "the timestep of each sample on a schedule of 1000, 1000 at pure noise, in whatever units the model takes it, (b); "
    "None where they are not known, which refuses a method that adds to the prompt",
    "negative": "for `takes`: samples of the negative prompt of classifier-free guidance, (b) bool: as the call's cache context, a guider "
    "or the pipeline that calls tells; a call of which nobody tells has none, or is refused",
    "elapsed": "share of the denoising that is done, by the step or else by how far the timestep fell; None if neither is known, float",
    "progress": "share of the training steps done, float in [0, 1]; 1 outside of training",
    "targets": "what the batch's column `hf_tokens_targets` holds, such as the right routes, Tensor; None where it has no such column",
    "prefill": "whether this pass brings a prompt or a whole sequence, and not one token of generation, bool",
    "memory": "a dict of the stream, new for each sequence; its `.tokens` (b m ...) follow the tokens, its `.rows` (b ...) the batch",
    "entered": "the tokens as this block found them, the residual in front of its self-attention, (b m d)",
    "attended": "the residual behind this block's self-attention, what that added included, (b m d)",
    "real": "tokens of this pass that are real, for a CacheCompressor too, (b m) bool",
    "received": "for a CacheCompressor: attention that each entry got since it is cached, mean of the heads on its key head, (b k n)",
    "newer": "for a CacheCompressor: real entries behind each one, (b n), or (b k n) for each key head",
    "recited": "for a CacheCompressor that `recites`: entries that this pass says again, (b n) or (b k n) bool",
    "reciting": "for a CacheCompressor that `recites`: entries of this pass, its lead included, (b n) or (b k n) bool",
    "record": "for a CacheCompressor: its own dict of a cache layer; its (b ...) tensors follow the rows, those of `.entries` the entries",
    "budget": "for a CacheCompressor: entries that may stay, (b 1) for a row or (b k) for each key head",
    "states": "for a CacheCompressor: a function that gives the cached keys and values, of all entries (b k n e), or of an index (b k r) "
    "alone; its `widths` are those of a key and of a value",
    "rotation": "for a CacheCompressor: how the block turns its queries and keys by their places: its `turn(x, by)` brings them "
    "(b h r e) so many places further, `ahead(x, count)` is the mean of the next places; `places` are those of this pass, (b m)",
    "stays": "for `fold` and `hold`: entries that stay, (b k n) bool",
    "goes": "for `fold` and `hold`: entries beyond the budget, (b k n) bool",
    "keys_below": "for a method with `pairs`: cached keys of the lower block of the pair, (b k n e)",
    "values_below": "for a method with `pairs`: cached values of the lower block of the pair, (b k n e)",
    "weights": "for a WeightEdit: the weights that it may change, without it, name -> (o i)",
    "logits": "for a ModelRouter or a TokenScorer, whose `hidden` is what the model's head read: what that returned for each, (b m v)",
    "predicted": "for a ModelRouter: the input embedding of the likeliest token by `logits`, (b m d)",
    "context": "for a WeightEdit: what each of its weights read of the real tokens, group of data -> name -> (t i)",
    "fisher": "for a WeightEdit: mean of the squared gradients of the loss over the batches, group of data -> name -> (o i)",
    "anchors": "for a VocabularyEdit: the model's rows of the tokens that both vocabularies have, (a d)",
    "donor_anchors": "for a VocabularyEdit: the donor's rows of the same tokens, (a e)",
    "donor_rows": "for a VocabularyEdit: the donor's rows of tokens that only it has, (u e)",
    "affinity": "for `attend`: a function that gives the scores of this attention call before its softmax, -inf where a query does not "
    "look: of all keys (b h m s), or of those of an index (b k r) for each key head, (b h m r); `by` and "
    "`of_queries` turn keys, (b 1|k r), and queries, (b 1 m), so many places further on, for a method that `turns`",
    "key_positions": "for `attend`: place of each key's token in the given sequence, as `positions` of the queries, (b 1|k s)",
    "own_keys": "for `attend`: keys of tokens that the bank put in, for each key head of this call, (b k s) bool",
    "own_tokens": "for `shift`: tokens that the bank put in, (b m) bool",
    "own": "for `conclude`: what became of the bank's tokens behind the last block, (b k d), zeros where they are not",
    "answers": "for a Pooler: what the tokens of its `ask` gathered in the last block that ran, in front of any norm, (b k d); else None",
    "labels": "for an Objective: the token that each place is to predict, as the model's own loss has it, -100 where there is none, (b n)",
    "logps": "for an Objective: log-probability that the model gives each label, 0 where there is none, (b n)",
    "ids": "for an Objective: the token that stands at each place of the stream that the head reads, (b n)",
    "head": "for an Objective: a function from what the head reads (... d), the signal `hidden`, to logits (... v)",
    "exits": "for an Objective: a function from the index of a block to what the head would read if the stream ended behind it, (b n d)",
    "updates": "for an Objective: steps of the optimizer behind this one, as a Trainer or `set_progress` tells; 0 where neither does, int",
    "block": "for an Objective: a function that runs one more block, like the last but one of the stream, as that was called: on states "
    "(k b n d) and k times its weights, name -> (k ...), as `dims.copy_block()` has them, (k b n d)",
    "target": "for an Objective: what a denoiser is to predict, (b ...)",
    "prediction": "for an Objective: what the denoiser predicted, (b ...)",
    "reference": "for an Objective: what the model without the adapter gives for the same, in the shape of `logps` or of `prediction`",
}
# What an Objective may name, and a method of any role in its word `judge`; `hidden` is what the head reads, `positions` count from 0 in
# each sample of a padded or packed row.
JUDGES = frozenset({"labels", "logps", "ids", "head", "block", "exits", "updates", "target", "prediction", "reference"})
OF_ALL_OBJECTIVES = frozenset({"hidden", "positions", "progress"})
# What one word alone may name.
OF_A_WORD = {
    "attend": frozenset({"affinity", "key_positions", "own_keys"}),
    "conclude": frozenset({"own"}),
    "shift": frozenset({"own_tokens"}),
    "takes": frozenset({"negative"}),
    "judge": JUDGES - {"target", "prediction"},
}
# What a CacheCompressor is given without a look at what the block computed.
OF_THE_CACHE = {
    *{"mask", "positions", "newer", "sizes", "states", "keys", "values", "keys_below", "values_below"},
    *{"record", "budget", "stays", "goes", "rotation", "real", "memory", "prefill", "kind", "layer", "layers", "prefix", "progress"},
}
# What a cache compressor may read that leaves as a page of code, which has these and of `scores` the last queries' alone.
OF_A_PAGE = {"scores", "mask", "positions", "newer", "budget", "received", "keys", "values", "layer", "layers", "kind", "prefill"}
AT_TABLE = {"kind", "layer", "layers", "progress", "targets"}  # what is known where embeddings are looked up
OF_A_QUERY = {"hidden", "mask", "positions", "fresh", "sizes"}  # what has a row for each query of an attention call
# What a word may name of its role's signals where that is not all: it is called for some queries at a time, or behind the model's head.
OF_A_CALL = {"attend": frozenset({*AT_TABLE, *OF_A_QUERY, "prefill"}), "judge": OF_ALL_OBJECTIVES}
AT_PROMPT = {*AT_TABLE, "hidden", "mask", "step", "steps", "timestep", "time", "elapsed"}  # where a prompt is given
AT_SITE: dict[str, tuple[str, set[str]]] = {"embedding": ("at the embeddings", AT_TABLE), "prompt": ("at the prompt", AT_PROMPT)}
# Signals that need a hook on the block's attention or MLP.
TAPPED = {"queries", "keys", "values", "scores"}
HOOKED = {
    **{"attention_input": "attention", "attention_output": "attention", "attended": "attended"},
    **{"mlp_input": "mlp", "mlp_output": "mlp"},
}
OF_ATTENTION = {name for name, hook in HOOKED.items() if hook != "mlp"}  # those of them that need a self-attention
OF_THE_BLOCK = {*TAPPED, *HOOKED}  # signals of what a block computed: there are none where it ran on no token
TURNED = "rotation"  # the signal that needs to know how a block turns its keys
SCORED = "received"  # the signal that is kept from the scores of each pass
SPANS = {"visual", "instruction", "pictures", "pictured"}  # these need a model that has tokens of pictures among its text
GRIDDED = "pictures"  # the one of these that needs their grids
PICTURED = "pictured"  # the signal that a sequence remembers, in our layers of its cache
OF_THE_OUTPUT = {"noise", "contrast", "guidance"}  # signals of what the model put out
