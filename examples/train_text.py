"""Train a token router, a KV compressor and a LoRA together with plain Trainer, save one small adapter, load it, generate.

python examples/train_text.py                                        # a tiny random model, seconds
python examples/train_text.py --model HuggingFaceTB/SmolLM2-135M --steps 200
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import hf_tokens
from hf_tokens.testing import zoo


def base(name: str | None) -> PreTrainedModel:
    """The named model, or a tiny random one."""
    return zoo.build("llama").model if name is None else AutoModelForCausalLM.from_pretrained(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="causal language model, a Hub id or a folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="text-adapter")
    given = parser.parse_args()
    torch.manual_seed(0)

    stack = [
        hf_tokens.FTPConfig(sparsity=0.25, strict=True),
        hf_tokens.PrefixKVConfig(budget=0.5),
        LoraConfig(target_modules=["q_proj", "v_proj"]),
    ]
    model = hf_tokens.get_token_model(base(given.model), stack)
    model.print_trainable_parameters()

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 64))]
    options = TrainingArguments(given.out, max_steps=given.steps, per_device_train_batch_size=2, report_to=[], save_strategy="no")
    Trainer(model=model, args=options, train_dataset=rows).train()
    model.save_pretrained(given.out)

    again = hf_tokens.load(given.out, base(given.model)).eval()
    prompt = rows[0]["input_ids"][None]
    text = again.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    same = torch.equal(
        text, model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    )
    whole, half = hf_tokens.measure(base(given.model), input_ids=prompt), hf_tokens.measure(again, input_ids=prompt)
    print(f"same text from the saved adapter: {same}")
    print(f"tokens computed {half.tokens} of {whole.tokens}, KV bytes {half.kv_bytes} of {whole.kv_bytes}")


if __name__ == "__main__":
    main()
