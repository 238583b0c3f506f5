"""Runs as findings and pictures see them, without training."""

from types import SimpleNamespace

from auxfast.train.methods import parse_method


def runs_of(method, scores, setting="", weights=()):
    """One finished run for each score, from seed 0 on; `weights` holds the loss weights of each outer step."""
    records = [SimpleNamespace(loss_weights=tuple(step)) for step in weights]
    same = {"method": parse_method(method), "setting": setting, "records": records}
    return [SimpleNamespace(**same, seed=seed, result=SimpleNamespace(score=s)) for seed, s in enumerate(scores)]


def unfinished(method, setting=""):
    return [SimpleNamespace(method=parse_method(method), setting=setting, seed=9, records=[], result=None)]
