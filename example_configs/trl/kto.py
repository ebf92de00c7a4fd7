"""KTO with a safety block: rows with `prompt`, `completion` and `label`.

    python kto.py --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name judged.jsonl --use_peft \
        --lora_target_modules all-linear --output_dir kto --safety safety.yaml

with the block in safety.yaml. Without `--safety` it is TRL's KTOTrainer.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_safety import SafeKTOConfig, SafeKTOTrainer

if __name__ == "__main__":
    script, training, model = TrlParser((ScriptArguments, SafeKTOConfig, ModelConfig)).parse_args_and_config()
    data = load_dataset("json", data_files=script.dataset_name, split=script.dataset_train_split)
    trainer = SafeKTOTrainer(
        model=model.model_name_or_path,  # the ALIGNED model
        args=training,
        train_dataset=data,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()
