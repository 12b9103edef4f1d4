{{/* The node's configuration file as TOML: `config`, merged with the keys that the chart sets. */}}

{{- define "tidegate.config" -}}
{{- include "tidegate.toml" (dict "path" "" "table" (include "tidegate.configTree" . | fromJson)) | trim }}
{{- end }}

{{/* The keys that take effect only after a restart. */}}
{{- define "tidegate.configAtStart" -}}
{{- $tree := include "tidegate.configTree" . | fromJson }}
{{- $parts := list (pick $tree "shards" "demo" "ops" "tls") }}
{{- $parts = append $parts (omit (get $tree "broker" | default dict) "subscribe_timeout") }}
{{- $parts = append $parts (pick (get $tree "public" | default dict) "listen") }}
{{- $parts = append $parts (pick (get $tree "auth" | default dict) "jwks_url" "jwks_interval" "jwks_ca_file") }}
{{- $parts = append $parts (pick (get $tree "log" | default dict) "format") }}
{{- toJson $parts }}
{{- end }}

{{/* The configuration as JSON, before it is rendered to TOML. */}}
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

{{/* A table with its subtables. TOML requires values before tables. Null values are left out. */}}
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

{{/* A JSON string is a valid TOML string. Helm reads integers as floats, which TOML distinguishes. */}}
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
