"""How times and where they were measured are written."""

CLASSES = {"tf32": "with TF32", "fp32": "in float32", "fp16": "in float16", "bf16": "in bfloat16"}


def where(record) -> str:
    versions = record["versions"]
    names = (("torch", "torch"), ("CuPy", "cupy"), ("NVRTC", "nvrtc"), ("driver", "driver"))
    found = [f"{name} {versions[key]}" for name, key in names if versions.get(key)]
    if "--no-wgmma" in record.get("command", ""):
        found.append("without wgmma")
    elif versions.get("nvrtc_wgmma") not in (None, versions["nvrtc"]):
        found.append(f"NVRTC {versions['nvrtc_wgmma']} for wgmma")
    return ", ".join([versions.get("gpu") or "CPU", *found, f"kernels `{record['digest'][:12]}`"])


def ms(row) -> str:
    return f"{row['ms']:.3g}"


def ratio(peer, row) -> str:
    return f"{peer['ms'] / row['ms']:.2f}x"


def is_eager(row, what, cls, n, who="eager") -> bool:
    found = (row["what"], row["class"], row["n"], row["who"], row["layout"])
    return found == (what, cls, n, who, "nchw") and row["ms"] is not None
