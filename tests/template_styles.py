"""Chat templates in the style of the published families: their constructs, in our own words."""

SYSTEM_FIRST = """
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{%- set rest = messages %}
{%- endif %}
"""

# Llama 3.x: a date, tools in the first user message, one call at a time, a tool's result that may be a dictionary.
LLAMA_TOOLS = (
    """{{- bos_token }}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "1 Jan 2025" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
"""
    + SYSTEM_FIRST
    + """
{{- "<|head|>system<|/head|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot|>" }}
{%- if tools_in_user_message and tools is not none %}
    {%- if rest | length != 0 %}
        {%- set first = rest[0]['content']|trim %}{%- set rest = rest[1:] %}
    {%- else %}{{- raise_exception("There is no user message to put the tools into") }}{%- endif %}
    {{- '<|head|>user<|/head|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot|>" }}
{%- endif %}
{%- for message in rest %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}
"""
)

# Qwen 3: thinking kept only after the last question, consecutive results of tools in one turn, a switch for thinking.
QWEN_THINKING = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not
        (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<result>\\n' }}{{- content }}{{- '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Mistral Nemo: alternation counted without tools, tools before the last question, ids of nine characters.
NEMO_TOOLS = (
    SYSTEM_FIRST
    + """{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in rest %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user and assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"function": {' }}
                {%- for key, value in tool.items() if key != "return" %}
                    {%- if value is string and not loop.first %}{{- ', "' + key + '": "' + value + '"' }}
                    {%- else %}{{- ', "' + key + '": ' + value|tojson }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system %}{{- "[INST]" + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS][" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}{{- out[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception("The id of a call has 9 characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[RESULT]{"content": ' + content|string + "}[/RESULT]" }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles") }}{%- endif %}
{%- endfor %}"""
)

# SmolLM3 and Falcon: switches cut out of the system message, variables with defaults, text replaced in a loop.
SMOL_SWITCHES = """
{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set mode = "/think" if enable_thinking else "/no_think" %}
{%- if messages[0].role == "system" %}
    {%- set said = messages[0].content %}
    {%- if "/no_think" in said %}{%- set mode = "/no_think" %}
    {%- elif "/think" in said %}{%- set mode = "/think" %}{%- endif %}
    {%- set own = said.replace("/no_think", "").replace("/think", "").rstrip() %}
{%- endif %}
{{- "<|im_start|>system\\n" -}}
Date: {{ strftime_now("%d %B %Y") }}, mode: {{ mode }}
{{ own if own else "You are helpful." }}
{% if xml_tools or tools %}
{%- set ns = namespace(text="Tools:\\n") %}
{%- for tool in (xml_tools or tools) %}{%- set ns.text = ns.text ~ (tool | string) ~ "\\n" %}{%- endfor %}
{{- ns.text + "\\n" }}
{%- endif %}
<|im_end|>
{% for message in messages %}
{%- set content = message.content.replace('/no_think', '').replace('/think', '') if message.content is string else "" %}
{%- if message.role == "user" %}
{{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
{%- elif message.role == "assistant" %}
{% generation %}
{%- if mode == "/think" %}
{{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
{%- else %}
{{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
{%- endif %}
{% endgeneration %}
{%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

# Hermes and gpt-oss: macros that call each other over a JSON schema.
SCHEMA_MACROS = """{%- macro kind(spec) %}
    {%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if basic[spec.type] is defined %}{{- basic[spec.type] }}
    {%- elif spec.type == "array" %}{{- "list[" + kind(spec['items']) + "]" }}
    {%- elif spec.type == "object" %}
        {%- if spec.additionalProperties is defined %}{{- "dict[str, " + kind(spec.additionalProperties) + ']' }}
        {%- else %}{{- "dict" }}{%- endif %}
    {%- elif spec.type is iterable and spec.type is not string %}
        {{- "Union[" }}
        {%- for t in spec.type %}{{- kind({"type": t}) }}{%- if not loop.last %}{{- "," }}{%- endif %}{%- endfor %}
        {{- "]" }}
    {%- else %}{{- "Any" }}{%- endif %}
{%- endmacro %}
{%- macro field(name, spec, required=[]) -%}
    {{- "// " + spec.description + "\\n" if spec.description }}
    {{- name }}{{- "?" if name not in required }}: {{ kind(spec) }}
    {%- if spec.enum %} ({{ spec.enum|map('tojson')|join(' | ') }}){% endif %}
    {%- if spec.default is defined %} = {{ spec.default|tojson }}{% endif -%}
{%- endmacro %}
{{- bos_token }}
{%- for tool in tools or [] %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- tool.name + '(' }}
    {%- for name, spec in tool.parameters.properties|items %}
        {{- field(name, spec, tool.parameters.required or []) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ")" }}{%- if tool.return is defined %}{{- " -> " + kind(tool.return) }}{%- endif %}
    {{- " - " + tool.description + "\\n\\n" }}
{%- endfor %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + (message.content or '')|string + eos_token }}
{%- endfor %}"""

# Command R and Granite: documents, a macro over the tools' results that breaks out of its loop, a list that grows.
DOCUMENTS = """{%- macro turn(documents) -%}
<|docs|>[{% for doc in documents %}{"{{ loop.index0 }}": {{ doc|dictsort|tojson }}}
    {{- "," if not loop.last }}{% endfor %}]
{%- endmacro -%}
{%- macro result(all, first) -%}
{"id": "{{ first.tool_call_id }}", "result": {{ first.content|tojson }}}
{%- endmacro -%}
{%- set seen = namespace(ids=[], sent=false) -%}
{{ bos_token }}{% set loop_messages = messages %}
{%- if controls and 'length' in controls %}<|length|>{{ controls['length']|upper }}{% endif %}
{%- for message in loop_messages %}
    {%- if message.role|lower == 'system' and loop.first %}<|sys|>{{ message.content|indent(2) }}
    {%- elif message.role|lower == 'user' %}<|usr|>{{ message.content }}
        {%- if documents and not seen.sent %}{% set seen.sent = true %}{{ turn(documents) }}{% endif %}
    {%- elif message.role|lower == 'assistant' %}<|bot|>{{ message.content|default('', true) }}
        {%- for call in message.tool_calls %}
            {%- set made = call['function'] %}
            {{- '[' ~ loop.index ~ '/' ~ loop.length ~ '] ' ~ made['name'] ~ made['arguments']|tojson(indent=2) }}
        {%- endfor %}
    {%- elif message.role|lower == 'tool' and message.tool_call_id not in seen.ids %}<|res|>[
{{ result(messages, message) }}
        {%- for other in messages[loop.index0 + 1:] %}
            {%- if other.role|lower == 'tool' %},
{{ result(messages, other) }}{%- set seen.ids = seen.ids + [other.tool_call_id] %}
            {%- else %}{%- break %}{%- endif %}
        {%- endfor %}
]
    {%- endif %}
{%- endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"""

# Multimodal and Gemma: content in parts, roles renamed, the system's words put before the first question.
PARTS = (
    SYSTEM_FIRST
    + """{{ bos_token }}{% for message in rest %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<turn>' + role + '\\n' + (system ~ '\\n\\n' if loop.first and system else '') }}
{%- if message['content'] is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}{{ '<image>' }}
        {%- elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
    {%- endfor %}
{%- endif %}</turn>
{% endfor %}{{ '<turn>model\\n' if add_generation_prompt }}"""
)

STYLES = {
    "llama tools": LLAMA_TOOLS,
    "qwen thinking": QWEN_THINKING,
    "nemo tools": NEMO_TOOLS,
    "smol switches": SMOL_SWITCHES,
    "schema macros": SCHEMA_MACROS,
    "documents": DOCUMENTS,
    "parts": PARTS,
}
