r"""Localize: any torch module learns by a rule, its linear layers replaced in place.

    forward    unchanged, bit for bit
    backward   grad_input = error @ feedback at every replaced layer      (`localgpt_core.layers.linear`)

The new layers share the parameters of the old ones (`localgpt_core.convert.layers`): optimisers, tied
weights, hooks and the keys of the state_dict stay valid, and the feedback comes as buffers beside them.

Beyond the reach of a conversion is a weight that a module uses without calling the layer that holds it.
`Localized.exact` lists what is left as it was, and why.
"""

from collections.abc import Callable
from dataclasses import fields

from torch import nn

from localgpt_core.common.validation import require, require_choice
from localgpt_core.convert.layers import choose, output_width, replacement, why_nothing
from localgpt_core.convert.localized import Localized, place_of
from localgpt_core.convert.taps import Taps
from localgpt_core.convert.upkeep import Upkeep
from localgpt_core.layers.between_steps import align
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.rules import RULES, RuleOptions

__all__ = ["Localized", "localize"]

NEED_INPUTS = {
    "fa_grape_start": "needs inputs: call Localized.align_feedback(step, forward=...) that often instead",
    "jvp_share": "has no effect on a module of your own: let forward run it on that share of a batch",
}


def localize(
    module: nn.Module,
    options: RuleOptions | None = None,
    *,
    method: str | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    output: str | None = None,
    seed: int = 0,
    **rule_options: object,
) -> Localized:
    """Replace the linear layers of ``module``, in place, by layers that learn by a rule.

    These are ``nn.Linear``, transformers' ``Conv1D`` and, for a rule with a local error, ``nn.Conv2d``.
    Values of the forward pass, parameters and torch's random state stay as they are. An optimiser made before
    stays valid, but for the feedback of Kolen-Pollack, which `Localized.attach` gives it.

    Args:
        module: Any module that holds linear layers.
        options: The rule and its feedback.
        method: Name of the rule, instead of ``options``.
        filter: Called with the name of a layer and the layer; only where it returns true, the layer is
            replaced. One with several names is replaced if it is for any of them. Default: all.
        output: Name of the layer whose output is the network's, called once in a forward pass. It learns from
            its exact local gradient, which is the output's error. A rule that uses the output's error needs
            it, and every replaced layer must then work on the tokens of the output: ``x`` (..., in), logits
            (..., V), with equal leading dimensions. Where the output pools the tokens of a sample, ``x``
            (B, T, in) and logits (B, V), each of them gets the error of its sample, grad_x[b, t] = e[b] @ F.
        seed: Seed of the feedback, unless ``feedback_seed`` is given.
        rule_options: Further fields of `RuleOptions`, beside ``method``.

    Raises:
        ValueError: For an unknown name, if nothing is left to replace or it was replaced before, for a rule
            that lacks its output layer, and for options of one that aligns to the network's Jacobian which
            need inputs.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> print(localize(network, method="dfa", output="2"))
        method='dfa': 2 layers changed, 0 exact
        changed
          0  3 -> 5
          2  5 -> 2, the output
        loop
          optimizer = torch.optim.AdamW(module.parameters())
          for x, y in batches:
              optimizer.zero_grad()
              loss_fn(module(x), y).backward()
              optimizer.step()
    """
    options = _options(options, method, rule_options)
    rule = RULES[options.method](options)
    if rule.aligns == "network":
        for name, allowed in NEED_INPUTS.items():
            value = getattr(options, name)
            require(value == getattr(RuleOptions, name), name, value, allowed)
    chosen, exact = choose(module, filter, rule.error == "output")
    names = list(dict.fromkeys(name for found in chosen.values() for name in found))
    require(bool(names), "module", type(module).__name__, why_nothing(module, exact))
    if output is not None:
        require_choice("output", output, names)
    allowed = f"method={options.method!r} needs the name of the output layer: one of " + ", ".join(names)
    require(output is not None or rule.error != "output", "output", output, allowed)

    taps, upkeep = Taps(), Upkeep(rule)
    error_features = None
    if output is not None:
        error_features = output_width(module.get_submodule(output))
    layers: dict[str, LocalLayer] = {}
    originals: dict[str, nn.Module] = {}
    for original, found in chosen.items():
        key = seed if options.feedback_seed is None else options.feedback_seed, "localize", found[0]
        is_output = output in found
        layer = replacement(original)(
            original, found[0], options, key, taps, upkeep, is_output, error_features
        )
        for name in found:
            layers[name], originals[name] = layer, original
    for name, layer in layers.items():
        parent, attribute = place_of(module, name)
        setattr(parent, attribute, layer)
    localized = Localized(module, options, layers, exact, originals, upkeep)
    for step in range(options.fa_grape_start):
        align(dict.fromkeys(layers.values()), seed, "start", step)
    return localized


def _options(options: RuleOptions | None, method: str | None, others: dict[str, object]) -> RuleOptions:
    given = {**({} if method is None else {"method": method}), **others}
    if options is not None:
        require(not given, "options", options, "allowed are options or their fields by name, not both")
        return options
    require(method is not None, "method", method, "allowed are " + ", ".join(map(repr, RULES)))
    for name in given:
        require_choice("option", name, [item.name for item in fields(RuleOptions)])
    return RuleOptions(**given)
