"""DPO with a safety block: rows with `prompt`, `chosen` and `rejected`.

    python dpo.py --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name pairs.jsonl --use_peft \
        --lora_target_modules all-linear --output_dir dpo --safety safety.yaml

with the block in safety.yaml. Without `--safety` it is TRL's DPOTrainer.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_safety import SafeDPOConfig, SafeDPOTrainer

if __name__ == "__main__":
    script, training, model = TrlParser((ScriptArguments, SafeDPOConfig, ModelConfig)).parse_args_and_config()
    data = load_dataset("json", data_files=script.dataset_name, split=script.dataset_train_split)
    trainer = SafeDPOTrainer(
        model=model.model_name_or_path,  # the ALIGNED model
        args=training,
        train_dataset=data,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()
