{{/* The node's configuration file: what `config` says, with what the chart itself decides, as TOML. */}}

{{- define "tidegate.config" -}}
{{- include "tidegate.toml" (dict "path" "" "table" (include "tidegate.configTree" . | fromJson)) | trim }}
{{- end }}

{{/* What only a new process takes: the parts that a running node does not read again. */}}
{{- define "tidegate.configAtStart" -}}
{{- $tree := include "tidegate.configTree" . | fromJson }}
{{- $parts := list (pick $tree "shards" "demo" "ops" "tls") }}
{{- $parts = append $parts (omit (get $tree "broker" | default dict) "subscribe_timeout") }}
{{- $parts = append $parts (pick (get $tree "public" | default dict) "listen") }}
{{- $parts = append $parts (pick (get $tree "auth" | default dict) "jwks_url" "jwks_interval" "jwks_ca_file") }}
{{- $parts = append $parts (pick (get $tree "log" | default dict) "format") }}
{{- toJson $parts }}
{{- end }}

{{/* The configuration before it is written down, as JSON. */}}
{{- define "tidegate.configTree" -}}
{{- $config := deepCopy .Values.config }}
{{- $own := dict
  "public" (dict "listen" (printf "%s:%d" .Values.listenAddress (int .Values.containerPorts.public)))
  "ops" (dict "listen" (printf "%s:%d" .Values.listenAddress (int .Values.containerPorts.ops)))
  "drain" (dict
    "pause" (printf "%ss" (include "tidegate.pauseSeconds" .))
    "window" (printf "%ds" (int .Values.drain.windowSeconds))
    "deadline" (printf "%ss" (include "tidegate.deadlineSeconds" .)))
}}
{{- with include "tidegate.redisUrl" . }}
{{- $_ := set $own "broker" (dict "url" .) }}
{{- end }}
{{- if include "tidegate.tlsSecret" . }}
{{- $_ := set $own "tls" (dict "cert" "/etc/tidegate/tls/tls.crt" "key" "/etc/tidegate/tls/tls.key") }}
{{- end }}
{{- range $key, $_ := include "tidegate.secretFiles" . | fromYaml }}
{{- $path := splitList "." $key }}
{{- $table := first $path }}
{{- $value := dict (last $path) (printf "/etc/tidegate/secrets/%s" $key) }}
{{- range (initial (rest $path) | reverse) }}{{- $value = dict . $value }}{{- end }}
{{- $own = mergeOverwrite $own (dict $table $value) }}
{{- end }}
{{- mergeOverwrite $config $own | toJson }}
{{- end }}

{{/* A table and those in it. Values come before tables: that is TOML's rule. What is null is left out. */}}
{{- define "tidegate.toml" -}}
{{- $path := .path }}
{{- range $key, $value := .table }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "tidegate.tomlKey" $key }} = {{ include "tidegate.tomlValue" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := .table }}
{{- if kindIs "map" $value }}
{{- $inner := printf "%s%s" (empty $path | ternary "" (printf "%s." $path)) (include "tidegate.tomlKey" $key) }}

[{{ $inner }}]
{{- include "tidegate.toml" (dict "path" $inner "table" $value) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* A JSON string is a TOML string. Helm reads whole numbers as floats, and TOML keeps them apart. */}}
{{- define "tidegate.tomlValue" -}}
{{- if kindIs "string" . }}{{ toJson . }}
{{- else if kindIs "slice" . -}}
[{{ range $index, $element := . }}{{ if $index }}, {{ end }}{{ include "tidegate.tomlValue" $element }}{{ end }}]
{{- else if kindIs "map" . -}}
{ {{ range $index, $key := keys . | sortAlpha }}{{ if $index }}, {{ end }}{{ include "tidegate.tomlKey" $key }} = {{ include "tidegate.tomlValue" (get $ $key) }}{{ end }} }
{{- else if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}
{{- else }}{{ . }}
{{- end }}
{{- end }}
