"""A second, slow LocalGPT that shares no code with the package: what the gradients must be.

No autograd Function is used. Every rule and every local derivative is written by stopping gradients in an
expression whose value is the forward pass:

    local error     y = sg(x) W^T + (x - sg(x)) sg(F)^T      value x W^T, and d/dx hands g F down
    output error    y = sg(x) W^T, and the loss gains sum(x * sg(e F)) less its own value, for every layer,
                    with e = (softmax(logits) - onehot) / tokens written out
    straight-through  x + sg(f(x) - x)
    gelu steps      x sg(s(x)) + sg(gelu(x) - x s(x)), s written out as a sum of steps
    center_scale    (x - mean x) / sg(sigma);    scale: (x - sg(mean x)) / sg(sigma)
    feedback point  y = sg(x), and the loss gains sum(z * sg(e F)) less its own value, z = x or, behind a
                    norm, (x - mean x) / sigma

sg is ``detach``. ``projected`` and the fused softmax claim to be exact: here they are plain operations.
"""

import math

import torch
from torch import Tensor


def matrix(weight, buffers, name: str) -> Tensor:
    return buffers[f"{name}.feedback_weight"]


# The matrix F of grad_input = error F, by rule: the rules that this implementation knows. One that enters the
# package may join them; until then it is held by the contract and by its own tests.
FEEDBACK = {
    "bp": lambda weight, buffers, name: weight,
    "fa": matrix,
    "dfa": matrix,
    "kp": matrix,
    "wm": matrix,
    "sign_sym": lambda weight, buffers, name: (
        ((weight > 0).to(weight) - (weight < 0).to(weight)) * buffers[f"{name}.feedback_scale"]
    ),
}
OUTPUT_ERROR = {"dfa"}


class Reference:
    """The forward pass of a model as a function of its named parameters."""

    def __init__(self, model) -> None:
        self.config = model.config
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.p = {
            name: p.detach().clone().requires_grad_(name in self.trained)
            for name, p in model.named_parameters()
        }
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.consumed: list[tuple[str, Tensor]] = []

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.p[f"{name}.weight"]
        method = self.config.method
        if self.config.dfa_granularity != "layer" and name != "head":
            method = {"bp": "bp", "grape": "fa", "kp": "kp"}[self.config.dfa_inside]
        y = torch.einsum("...i,oi->...o", x.detach(), weight)
        if method in OUTPUT_ERROR and name != "head":
            self.consumed.append((name, x))
        else:
            feedback = FEEDBACK[method](weight.detach(), self.buffers, name)
            y = y + torch.einsum("...i,oi->...o", x - x.detach(), feedback)
        if f"{name}.bias" in self.p:
            y = y + self.p[f"{name}.bias"]
        return y

    def point(self, name: str, x: Tensor) -> Tensor:
        z = x
        if self.config.dfa_norm:
            mean = x.mean(-1, keepdim=True)
            z = (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        self.consumed.append((name, z))
        return x.detach()

    def norm(self, name: str, x: Tensor) -> Tensor:
        mode = self.config.ln_mode
        mean = x.mean(-1, keepdim=True)
        sigma = ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        gamma = self.p[f"{name}.ln.weight" if mode == "ste" else f"{name}.weight"]
        names = {"bp": f"{name}.bias", "none": f"{name}.bias", "ste": f"{name}.ln.bias"}
        beta = self.p[names.get(mode, f"{name}.bias_param")]
        if mode == "none":
            return x / (0.02 * math.sqrt(2)) * gamma + beta
        if mode in ("center_scale", "scale"):
            sigma = sigma.detach()
        if mode == "scale":
            mean = mean.detach()
        y = (x - mean) / sigma * gamma + beta
        return x + (y - x).detach() if mode == "ste" else y

    def attention(self, name: str, x: Tensor) -> Tensor:
        config = self.config
        width = config.n_embd // config.n_head
        q, k, v = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        heads = []
        for h in range(config.n_head):
            mine = slice(h * width, (h + 1) * width)
            scores = torch.einsum("btd,bsd->bts", q[..., mine], k[..., mine]) / math.sqrt(width)
            if config.attn_mode == "softmax":
                powers = torch.where(past, (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0.0)
                weights = powers / powers.sum(-1, keepdim=True)
            else:
                bias = {"zero": 0.0, "neg_log_n": -math.log(config.block_size)}.get(config.sigmoid_bias_mode)
                scores = scores + (self.p[f"{name}.sig_bias"] if bias is None else bias)
                weights = (1 + (scores / 2).tanh()) / 2
                if config.ste_sigmoid:
                    weights = scores + (weights - scores).detach()
                weights = torch.where(past, weights, 0.0)
            heads.append(torch.einsum("bts,bsd->btd", weights, v[..., mine]))
        return self.linear(f"{name}.o_proj", torch.cat(heads, -1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.fc", x)
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        if self.config.ste_gelu:
            slope = {
                "identity": lambda x: 1.0,
                "relu": lambda x: (x > 0).to(x),
                "steps": lambda x: 0.33 * ((x > -0.449).to(x) + (x > 0.449).to(x)) + 0.34 * (x > 0).to(x),
            }[self.config.gelu_surrogate](hidden.detach())
            gelu = hidden * slope + (gelu - hidden * slope).detach()
        return self.linear(f"{name}.proj", winners(gelu, self.config.mlp_topk))

    def block(self, name: str, x: Tensor) -> Tensor:
        config = self.config
        gate = {part: self.p.get(f"{name}.alpha_{part}", 1.0) for part in ("attn", "mlp")}
        q = self.buffers.get(f"{name}.subspace.Q")
        at = [int(part) for part in config.bottleneck_at.split(",") if part] or range(config.n_layer)
        narrow = int(name.rpartition(".")[2]) in at
        constrains = config.subspace_mode == "constrain" and narrow

        def written(y: Tensor) -> Tensor:
            return torch.einsum("btc,cr,dr->btd", y, q, q) if constrains else y

        x = x + gate["attn"] * written(self.attention(f"{name}.attn", self.norm(f"{name}.ln1", x)))
        if config.dfa_granularity == "sublayer":
            x = self.point(f"{name}.feedback_attn", x)
        x = x + gate["mlp"] * written(self.mlp(f"{name}.mlp", self.norm(f"{name}.ln2", x)))
        if narrow:
            x = winners(x, config.resid_topk)
            if config.vq_codes:
                x = quantised(x, self.buffers[f"{name}.vq.codebook"], config)
            if config.resid_bits:
                x = x + (rounded(x, config.resid_bits) - x).detach()
            if config.subspace_rank and not constrains:
                x = torch.einsum("btc,cr,dr->btd", x, q, q)
        if config.dfa_granularity != "layer":
            x = self.point(f"{name}.feedback", x)
        return x

    def logits(self, idx: Tensor) -> Tensor:
        config = self.config
        positions = torch.arange(idx.shape[1])
        learnt = {name: self.p[f"{name}.weight"] for name in ("tok_emb", "pos_emb")}
        if config.subspace_embeddings == "constrain":
            q = self.buffers["blocks.0.subspace.Q"]
            for name, now in learnt.items():
                first = self.buffers[f"{name}_start"]
                learnt[name] = first + torch.einsum("vc,cr,dr->vd", now - first, q, q)
        x = learnt["tok_emb"][idx] + learnt["pos_emb"][positions]
        for i in range(config.n_layer):
            x = self.block(f"blocks.{i}", x)
        return self.linear("head", self.norm("ln_f", x))

    def gradients(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Return the logits, the loss and the gradient of every parameter by name."""
        self.consumed.clear()
        logits = self.logits(idx)
        shifted = logits - logits.detach().amax(-1, keepdim=True)
        log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
        onehot = torch.eye(self.config.vocab_size, dtype=logits.dtype)[targets]
        loss = -(log_p * onehot).sum(-1).mean()
        error = ((log_p.exp() - onehot) / targets.numel()).detach()
        objective = loss
        for name, x in self.consumed:
            feedback = FEEDBACK[self.config.method](None, self.buffers, name)
            pull = (x * torch.einsum("btv,vi->bti", error, feedback)).sum()
            objective = objective + pull - pull.detach()
        names = [name for name in self.p if name in self.trained]
        grads = torch.autograd.grad(objective, [self.p[name] for name in names], allow_unused=True)
        return logits.detach(), loss.detach(), dict.fromkeys(self.p) | dict(zip(names, grads, strict=True))


def winners(x: Tensor, k: int) -> Tensor:
    """Return x times the mask of its k largest magnitudes per row; all of it where k is 0."""
    if not k:
        return x
    rank = x.detach().abs().argsort(-1, descending=True).argsort(-1)
    return x * (rank < k)


def quantised(x: Tensor, codebook: Tensor, config) -> Tensor:
    """Return the nearest code of every group, with the derivative of what the option names instead."""
    books, out = codebook.view(config.vq_groups, -1, x.shape[-1] // config.vq_groups), []
    for part, book in zip(x.chunk(config.vq_groups, dim=-1), books, strict=True):
        size = part.norm(dim=-1, keepdim=True)
        length = size.detach() if config.vq_rms == "token" else part.shape[-1] ** 0.5
        u = (part / size).detach()
        c = nearest(u, book)
        smooth = part
        if config.vq_backward == "tangent":
            smooth = length * part / size
        elif config.vq_backward == "rotation":
            w = (u + c) / (u + c).norm(dim=-1, keepdim=True)
            turn = torch.eye(u.shape[-1], dtype=u.dtype) + 2 * (outer(c, u) - outer(w, w))
            smooth = length / size.detach() * torch.einsum("...ij,...j->...i", turn, part)
        out.append(smooth + (length * c - smooth).detach())
    return torch.cat(out, dim=-1)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return the nearest of 2^bits levels from -a to a, a the largest magnitude of a row."""
    a = x.abs().amax(-1, keepdim=True)
    levels = a * torch.linspace(-1, 1, 2**bits, dtype=x.dtype)
    nearest_level = (x[..., None] - levels[..., None, :]).abs().argmin(-1)
    return levels.gather(-1, nearest_level)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Return, token by token, the code of largest cosine, as long as the token."""
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        token = x[tuple(place)]
        cosines = [torch.dot(token, code) / (token.norm() * code.norm()) for code in codebook]
        out[tuple(place)] = codebook[int(torch.stack(cosines).argmax())] * token.norm()
    return out


def relative_error(actual: dict, expected: dict) -> dict[str, float]:
    """Return the largest deviation of each gradient, relative to its own largest entry.

    A gradient that is zero in exact arithmetic (softmax attention ignores the bias of its keys) is measured
    against the largest of all.
    """
    overall = max(g.abs().max().item() for g in expected.values() if g is not None)
    errors = {}
    for name, want in expected.items():
        if (want is None) != (actual[name] is None):
            errors[name] = math.inf
        elif want is not None:
            own = want.abs().max().item()
            scale = own if own > 1e-10 * overall else overall
            errors[name] = ((actual[name] - want).abs().max() / scale).item()
    return errors
