"""GRPO with a safety block: rows with `prompt`.

    python grpo.py --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name prompts.jsonl --use_peft \
        --lora_target_modules all-linear --output_dir grpo --safety safety.yaml

with the block in safety.yaml. Without `--safety` it is TRL's GRPOTrainer.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_safety import SafeGRPOConfig, SafeGRPOTrainer


def short(completions: list, **kwargs: object) -> list[float]:
    """The reward: put your own here."""
    return [-float(len(str(completion))) for completion in completions]


if __name__ == "__main__":
    script, training, model = TrlParser((ScriptArguments, SafeGRPOConfig, ModelConfig)).parse_args_and_config()
    data = load_dataset("json", data_files=script.dataset_name, split=script.dataset_train_split)
    trainer = SafeGRPOTrainer(
        model=model.model_name_or_path,  # the ALIGNED model
        reward_funcs=short,
        args=training,
        train_dataset=data,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()
