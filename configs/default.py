"""Sets every field to its default. The other configs say what differs and why.

mhc_jax/ranges.py has the range of every number, in this order. Any field can be set on the command line:
--config.model.n=8 --config.optimizer.learning_rate=1e-3
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of parameters, 0 to 2**32 - 1; the order of the data has data.shuffle_seed
    config.steps = 1000  # optimizer updates
    config.batch_size = 32  # sequences an update, over all devices
    config.log_every = 1  # steps between training metrics, >= 1
    config.eval_every = 200  # steps between evaluations, 0: only at the end
    config.eval_batches = 8  # batches of the validation split an evaluation reads, one pass at most
    config.gains_every = 50  # steps between gain magnitudes (hc and mhc), 0: only at the end
    config.checkpoint_every = 500  # steps between checkpoints, 0: only at the end
    config.checkpoints_kept = 2  # newest checkpoints kept, >= 1
    config.on_failed_save = (
        "stop"  # if a checkpoint and the next try both fail: "stop" or "continue"
    )
    # If loss, gradient or update of a step is not finite: stop | skip (leave its update out, go on) |
    # rollback (to the newest checkpoint, past the batches since).
    config.on_non_finite = "stop"
    config.on_corrupt_data = (
        "stop"  # if a record of array_record is damaged: stop | skip (and count)
    )
    config.tensorboard = True  # write TensorBoard events beside metrics.jsonl
    # Order of work where mesh.pipe > 1: gpipe | 1f1b | dualpipev (docs/pipeline.md). May change when a run is
    # resumed, as the mesh may.
    config.pipe_schedule = "1f1b"
    # 1f1b and dualpipev: gradients of matrices wait until a device would idle (zero bubble). Fewer idle ticks
    # for more memory.
    config.pipe_split_backward = False

    model = config.model = ml_collections.ConfigDict()
    model.vocab_size = 256  # at least that of data.tokenizer
    model.num_blocks = 12  # attention + FFN each: two sublayers
    model.width = 512  # C, entries of one stream
    model.attention = "mha"  # mha | mla (compressed keys and values, as DeepSeek-V3)
    model.num_heads = 8  # mha: width / num_heads must be an even integer
    model.head_dim = 128  # mla: of a head's values, and of its keys without position
    model.rope_dim = 64  # mla: the part of queries and keys that carries the position, even
    model.kv_rank = 512  # mla: entries of the compressed keys and values of a token
    model.rope_theta = 10000.0  # base of the rotary wavelengths, tokens
    model.ffn_width = 1408  # hidden entries of SwiGLU; unused by a model with experts
    model.num_experts = 0  # routed experts of every block but the leading ones, 0: dense
    model.experts_per_token = 6  # routed experts that a token uses, 1 to num_experts
    model.shared_experts = 2  # experts that every token uses
    model.expert_width = 896  # hidden entries of one expert
    model.leading_dense_blocks = 1  # first blocks, with an FFN of all experts that a token uses
    # How tokens reach their experts: auto (the platform's best) | dropless | capacity.
    model.moe_dispatch = "auto"
    model.capacity_factor = 1.25  # capacity: places of an expert over the mean load, >= 1
    model.balance_rate = 1e-3  # step of the router's balance bias against its load, 0: none
    model.sequence_balance_weight = 0.0  # of the sequence-wise balance loss, 0: none
    model.tie_embeddings = False  # unembed with the embedding matrix
    model.dtype = (
        "bfloat16"  # of activations and streams: bfloat16 | float32; parameters are float32
    )
    model.init_std = 0.02  # of embedding and matrices at the start, > 0
    model.norm_eps = 1e-20  # of every RMSNorm (Table 5)
    model.connection = "mhc"  # residual | hc | mhc
    model.n = 4  # streams, >= 1; ignored by residual
    model.readout = "sum"  # of the streams at the end: sum | mean | head; lookahead_pre has its own
    # Gating factors at the start: a number (Table 5: 0.01), or auto: by n and width, see
    # mhc_jax/initialisation.py. config.json holds the number.
    model.alpha_init = config_dict.FieldReference("auto", field_type=object)
    # mhc: each sublayer predicts how the next one reads, and the last how the streams are read out, so that a
    # GPU reads them once a sublayer (docs/kernels.md).
    model.lookahead_pre = False
    # Of mhc: birkhoff | identity | lite (n up to 5) | kromhc (n a power of two) | orthogonal |
    # row_stochastic; see docs/variants.md.
    model.manifold = "birkhoff"
    model.static_res = False  # mhc: one h_res a sublayer, learned but the same for every token
    model.sinkhorn_iterations = 20  # t_max of Eq. 9, >= 1
    model.pre_init_gap = 4.0  # logit gap of h_pre at the start, >= 0
    model.res_init_gap = 8.0  # logit gap of h_res at the start, >= 0; 10 and more freezes it
    model.hc_use_pre = True  # hc: learn h_pre, else 1/n (Table 1)
    model.hc_use_post = True  # hc: learn h_post, else ones
    model.hc_use_res = True  # hc: learn h_res, else the identity
    model.mhc_use_pre = True  # mhc: the same
    model.mhc_use_post = True
    model.mhc_use_res = True
    # Of the mHC kernels: xla | pallas | triton, or names by operation as in "read=cuda,boundary=cuda". None
    # (--config.model.implementation=None), and what the names leave out: the best of the platform
    # (`kernels_pallas.explain`). May change when a run is resumed.
    model.implementation = config_dict.placeholder(str)
    # What the backward pass computes again: none | mhc (streams and mappings, not F) | full | offload
    # (full, with what is stored in the host's memory). May change when a run is resumed.
    model.remat = "none"
    # L_r, sublayers between two stored streams: an even number as text, or auto (Eq. 20).
    model.recompute_block = "auto"
    # True compiles one block and loops over it. False writes all blocks out: this compiles longer, but what
    # the backward pass needs is not copied into stacked arrays and back. May change too.
    model.scan_blocks = True
    # Number of parts in which a device's tokens get their logits, one after the other. May change too.
    model.loss_chunks = 1

    optimizer = config.optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 1e-3  # peak
    optimizer.schedule = "cosine"  # constant | step (paper) | cosine | wsd, after the warm-up
    optimizer.warmup_steps = 100  # linear from 0, < steps; the first update of a warm-up is empty
    optimizer.final_fraction = 0.1  # of the peak, where cosine and wsd end
    optimizer.decay_fraction = 0.2  # last part of the run in which wsd decays, 0 to 1
    optimizer.b1 = 0.9  # decay of the mean of gradients, 0 to 1 (1: the update is NaN)
    optimizer.b2 = 0.95  # decay of the mean of their squares, 0 to 1 (1: the update is NaN)
    optimizer.eps = 1e-8  # Table 5 has 1e-20, which turns rounding noise into full-size updates
    optimizer.weight_decay = 0.1  # on matrices; never on norms, bias or alpha
    optimizer.clip_norm = 1.0  # of the gradient, 0: no clipping
    optimizer.accumulate_steps = 1  # parts of a batch that are run one after the other

    data = config.data = ml_collections.ConfigDict()
    data.source = "stdlib"  # stdlib | text | array_record | synthetic
    data.path = ""  # glob of the files (text, array_record)
    data.tokenizer = "byte"  # byte, or the path of a Hugging Face tokenizers JSON file
    data.sequence_length = 256  # tokens
    data.validation_fraction = 0.05  # of the files, 0 to 1 exclusive
    data.shuffle_seed = 0  # of the order of training windows
    data.synthetic_vocab_size = 64  # of the synthetic source

    # Devices along each axis of the mesh; one axis may be -1: all that the others leave.
    mesh = config.mesh = ml_collections.ConfigDict()
    mesh.pipe = 1  # blocks, as stages; micro-batches are optimizer.accumulate_steps
    mesh.data = -1  # sequences, parameters copied
    mesh.fsdp = 1  # sequences, parameters split
    mesh.expert = 1  # experts; divides model.num_experts
    mesh.tensor = 1  # heads and hidden entries
    mesh.sequence = 1  # tokens of a sequence
    return config
