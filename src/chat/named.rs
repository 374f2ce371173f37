//! Templates by the name of a family, for files that have none. They are short: text alone, no tools.

/// The names of the templates.
pub const NAMES: [&str; 10] = [
    "chatml", "llama2", "llama3", "mistral", "gemma", "phi3", "zephyr", "vicuna", "alpaca", "plain",
];

/// The template of that name.
pub(super) fn source(name: &str) -> Option<&'static str> {
    Some(match name {
        "chatml" => {
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        }
        // The system's message goes into the first of the user.
        "llama2" => {
            "{% set ns = namespace(system='') %}{% for m in messages %}\
             {% if m.role == 'system' %}\
             {% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}\
             {% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system }}{{ m.content }} [/INST]\
             {% set ns.system = '' %}\
             {% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
        }
        "llama3" => {
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n\
             {{ m.content | trim }}<|eot_id|>{% endfor %}\
             {% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        }
        "mistral" => {
            "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}\
             {% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}\
             {% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]\
             {% set ns.system = '' %}\
             {% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        }
        "gemma" => {
            "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}\
             {% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}{% else %}\
             <start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n\
             {{ ns.system }}{{ m.content }}<end_of_turn>\n{% set ns.system = '' %}\
             {% endif %}{% endfor %}\
             {% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        }
        "phi3" => {
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        }
        "zephyr" => {
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}\
             {% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        }
        "vicuna" => {
            "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}\n\
             {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}\n\
             {% else %}{{ m.content }}\n\n{% endif %}{% endfor %}\
             {% if add_generation_prompt %}ASSISTANT:{% endif %}"
        }
        "alpaca" => {
            "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n\
             {% elif m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n\
             {% else %}{{ m.content }}\n\n{% endif %}{% endfor %}\
             {% if add_generation_prompt %}### Response:\n{% endif %}"
        }
        // For models that were never tuned to answer.
        "plain" => "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
        _ => return None,
    })
}
