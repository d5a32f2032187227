"""What lmms-eval calls for the task of local.yaml; it runs in lmms-eval's own environment."""

from PIL import Image


def pictures(row):
    return [Image.open(path).convert("RGB") for path in row["pictures"]]


def text(row, lmms_eval_specific_kwargs=None):
    return row["question"]


def scores(row, results):
    return {"answered": float("LMMS_EVAL_REQUEST_FAILED" not in results[0])}
