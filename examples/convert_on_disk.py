"""Convert a checkpoint on disk to the layout of an engine, verify the result, and convert it back.

    python examples/convert_on_disk.py [PATH]

Shows that no bit is lost on the way there and back. Without a path, the script writes a small Qwen3-MoE checkpoint
first. All output goes to a temporary directory, so PATH needs twice its size there.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

SMALL = Qwen3MoeConfig(
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_experts=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1000,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        published = sys.argv[1] if len(sys.argv) > 1 else str(Path(directory, "published"))
        grouped, back = Path(directory, "grouped"), Path(directory, "back")
        if len(sys.argv) == 1:
            model = Qwen3MoeForCausalLM(SMALL).to(torch.bfloat16)
            model.save_pretrained(published)

        # Convert from file to file. If this process is killed, the same call resumes with the unfinished files.
        report = amc.convert_checkpoint(published, grouped, layout="nemo", max_shard_size="4MB")
        print(f"{len(report.files)} files, {report.bytes_written / 1e6:.1f} MB, in {report.seconds:.2f} s")

        # convert_checkpoint has compared the tensors already (verify=True). This call does it again, at any later time.
        compared = amc.verify_checkpoint(published, grouped, layout="nemo")
        print(f"{compared / 1e6:.1f} MB are the conversion of the published checkpoint, bit for bit")

        # Convert back: one tensor per expert again, under the published names.
        amc.convert_checkpoint(grouped, back, layout="per_expert")
        compared = amc.verify_checkpoint(published, back, rules=[])
        print(f"{compared / 1e6:.1f} MB are the published tensors again, bit for bit")


if __name__ == "__main__":
    main()
