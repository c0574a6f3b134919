"""The reference quantizer's older library with the settings of its W4A8 script, in its own environment.

python reference_w4a8.py MODEL OUT CALIB.json [DTYPE], with the folder that reference_quantizer.py makes; DTYPE in which
the model runs, bfloat16 unless given. The script itself,
`example/DeepSeek/quant_deepseek_w4a8.py`, is not in the package, what it calls is: m4 smoothing, then routed experts in
two levels with groups of 256, dense and shared ones dynamic int8, attention static int8, kv_b_proj in float.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

TYPES = {"*.mlp.experts.*": "w4a8_dynamic", "*.mlp.*": "w8a8_dynamic", "*": "w8a8"}
FLOAT = ("kv_b_proj", "gate")
STEM = "quant_model_weight_w8a8_dynamic.safetensors"


def main() -> None:
    folder, out, calib = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[4]) if len(sys.argv) > 4 else torch.bfloat16
    model, data = open_model(folder, dtype), windows(folder, calib)
    from msmodelslim.pytorch.llm_ptq.anti_outlier import (  # type: ignore[import-not-found]
        AntiOutlier,
        AntiOutlierConfig,
    )
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig  # type: ignore[import-not-found]

    smoothing = AntiOutlierConfig(w_bit=8, a_bit=8, anti_method="m4", dev_type="cpu")
    AntiOutlier(model, calib_data=data, cfg=smoothing, norm_class_name="DeepseekV3RMSNorm").process()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = QuantConfig(
        w_bit=4,
        a_bit=8,
        disable_names=[name for name in linears if name.rpartition(".")[2] in FLOAT],
        dev_type="cpu",
        act_method=1,
        pr=1.0,
        w_sym=True,
        mm_tensor=False,
        is_lowbit=True,
        open_outlier=False,
        is_dynamic=True,
        group_size=256,
    )
    calibrator = Calibrator(model, config, calib_data=data, disable_level="L0", mix_cfg=TYPES)
    calibrator.run()
    names = {"json_name": "quant_model_description.json", "safetensors_name": STEM}
    calibrator.save(str(out), save_type=["ascendV1"], part_file_size=4, **names)


def open_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of `folder`, without the layer of multi-token prediction."""
    sys.path.insert(0, str(folder))
    from reference_model import ForCausalLM  # type: ignore[import-not-found]

    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = DeepseekV3Config(**{key: value for key, value in document.items() if key != "auto_map"})
    config._attn_implementation = "eager"
    torch.set_default_dtype(dtype)
    model = ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config.torch_dtype = dtype
    model.load_state_dict(load_file(min(folder.glob("*.safetensors"))))
    return model.eval()


def windows(folder: Path, calib: Path) -> list[list[Tensor]]:
    """Token ids and mask of each text."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    encoded = (tokenizer(text, return_tensors="pt") for text in json.loads(calib.read_text(encoding="utf-8")))
    return [[each["input_ids"], each["attention_mask"]] for each in encoded]


if __name__ == "__main__":
    main()
