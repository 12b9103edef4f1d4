{{/* What the schema cannot say: values that are sound one by one and wrong together. Every guard ends the
rendering with what is wrong and what to set instead. */}}

{{- define "tidegate.guards" -}}
{{- include "tidegate.guardSecrets" . }}
{{- include "tidegate.guardRedis" . }}
{{- include "tidegate.guardFleet" . }}
{{- include "tidegate.guardTimes" . }}
{{- include "tidegate.guardMonitors" . }}
{{- end }}

{{- define "tidegate.guardSecrets" -}}
{{- $managed := dict
  "public.listen" "listenAddress and containerPorts.public"
  "ops.listen" "listenAddress and containerPorts.ops"
  "broker.url" "redis.url or redis.existingSecret"
  "broker.url_file" "redis.existingSecret"
  "broker.ca_file" "redis.caSecret"
  "auth.hs256_secret" "auth.existingSecret"
  "auth.hs256_secret_file" "auth.existingSecret"
  "tls.cert" "tls.existingSecret or tls.certManager"
  "tls.key" "tls.existingSecret or tls.certManager"
  "drain.pause" "drain.pauseSeconds"
  "drain.window" "drain.windowSeconds"
  "drain.deadline" "drain.flushSeconds"
}}
{{- $config := .Values.config }}
{{- range $key, $instead := $managed }}
{{- $path := splitList "." $key }}
{{- if hasKey (get $config (first $path) | default dict) (last $path) }}
{{- fail (printf "config.%s: this key is the chart's; set %s" $key $instead) }}
{{- end }}
{{- end }}
{{- include "tidegate.guardNoSecretIn" (dict "path" "config" "table" $config) }}
{{- range $key, $_ := .Values.secretFiles }}
{{- if hasKey $managed $key }}
{{- fail (printf "secretFiles.%s: this key is the chart's; set %s" $key (get $managed $key)) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if and (hasKey . "value") (regexMatch "(?i)^TIDEGATE_.*(SECRET|PASSWORD|API_KEYS?|PRIVATE_KEY|BROKER__URL)$" .name) }}
{{- fail (printf "extraEnv: %s holds a secret; take it from a Secret with valueFrom, or mount it with secretFiles" .name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A ConfigMap is no place for secrets. Keys that name a file end in _file and pass. */}}
{{- define "tidegate.guardNoSecretIn" -}}
{{- $path := .path }}
{{- range $key, $value := .table }}
{{- $here := printf "%s.%s" $path $key }}
{{- if kindIs "map" $value }}
{{- include "tidegate.guardNoSecretIn" (dict "path" $here "table" $value) }}
{{- else if regexMatch "(?i)(secret|secrets|password|passphrase|private_key|api_key|api_keys)$" $key }}
{{- fail (printf "%s: a secret does not belong into values; put it into a Secret and name the file with secretFiles" $here) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.guardRedis" -}}
{{- with .Values.redis }}
{{- $ways := list }}
{{- if .url }}{{ $ways = append $ways "redis.url" }}{{ end }}
{{- if .existingSecret }}{{ $ways = append $ways "redis.existingSecret" }}{{ end }}
{{- if .development.enabled }}{{ $ways = append $ways "redis.development.enabled" }}{{ end }}
{{- if gt (len $ways) 1 }}
{{- fail (printf "%s: set only one of them" (join ", " $ways)) }}
{{- end }}
{{- if regexMatch "^[^/]*//[^/]*:[^/@]*@" .url }}
{{- fail "redis.url holds a password; put the whole address into a Secret and name it with redis.existingSecret" }}
{{- end }}
{{- if and .caSecret (hasPrefix "redis://" $.Values.redis.url) }}
{{- fail "redis.caSecret is for Redis behind TLS: write rediss:// in redis.url" }}
{{- end }}
{{- /* What the node of this appVersion does not serve; the chart's tests compare this with the node. */}}
{{- range list "redis+sentinel" "rediss+sentinel" "redis+cluster" "rediss+cluster" }}
{{- if hasPrefix (printf "%s:" .) $.Values.redis.url }}
{{- fail (printf "redis.url: Tidegate %s does not serve %s:// yet; name one Redis server with redis:// or rediss://" $.Chart.AppVersion .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.guardFleet" -}}
{{- $redis := or (include "tidegate.redisUrl" .) .Values.redis.existingSecret .Values.extraEnvFrom }}
{{- range .Values.extraEnv }}
{{- if hasPrefix "TIDEGATE_BROKER__URL" (upper .name) }}{{ $redis = true }}{{ end }}
{{- end }}
{{- if gt (include "tidegate.maxPods" . | int) 1 }}
{{- if not $redis }}
{{- fail "more than one pod needs a Redis that all of them use, or clients of different pods would not hear each other: set redis.url, redis.existingSecret or (for trying) redis.development.enabled" }}
{{- end }}
{{- if not (include "tidegate.commonKey" .) }}
{{- fail "more than one pod needs a common key, or a token of one would be refused by the next: set auth.existingSecret" }}
{{- end }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if ne .kind "none" }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %d and autoscaling.maxReplicas is %d" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- $most := get (get $.Values.config "limits" | default dict) "connections" | default 100000 | int }}
{{- if ge (int .connectionsPerPod) $most }}
{{- fail (printf "autoscaling.connectionsPerPod is %d: it must be below limits.connections (%d), or pods are full before there are more" (int .connectionsPerPod) $most) }}
{{- end }}
{{- if and (gt (int .cpuUtilization) 0) (not (dig "requests" "cpu" "" $.Values.resources)) }}
{{- fail "autoscaling.cpuUtilization is in per cent of resources.requests.cpu, which is not set" }}
{{- end }}
{{- end }}
{{- if and (eq .kind "keda") (not .keda.serverAddress) }}
{{- fail "autoscaling.kind keda needs autoscaling.keda.serverAddress, the address of Prometheus" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.guardTimes" -}}
{{- $given := int .Values.terminationGracePeriodSeconds }}
{{- $needed := include "tidegate.graceNeeded" . | int }}
{{- if and (gt $given 0) (lt $given $needed) }}
{{- with .Values.drain }}
{{- fail (printf "terminationGracePeriodSeconds is %d, and a pod needs %d to leave: drain.preStopSeconds %d + pauseSeconds %d + windowSeconds %d + flushSeconds %d + marginSeconds %d" $given $needed (int .preStopSeconds) (int .pauseSeconds) (int .windowSeconds) (int .flushSeconds) (int .marginSeconds)) }}
{{- end }}
{{- end }}
{{- if and (gt (int .Values.progressDeadlineSeconds) 0) (le (int .Values.progressDeadlineSeconds) (int .Values.minReadySeconds)) }}
{{- fail "progressDeadlineSeconds must be longer than minReadySeconds" }}
{{- end }}
{{- if eq (int .Values.containerPorts.public) (int .Values.containerPorts.ops) }}
{{- fail "containerPorts.public and containerPorts.ops must differ: the ops listener is not for clients" }}
{{- end }}
{{- if and .Values.tls.existingSecret .Values.tls.certManager.enabled }}
{{- fail "tls.existingSecret, tls.certManager.enabled: set only one of them" }}
{{- end }}
{{- if and .Values.tls.certManager.enabled (not (get .Values.tls.certManager.issuerRef "name")) }}
{{- fail "tls.certManager needs tls.certManager.issuerRef.name" }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute needs httpRoute.parentRefs: the Gateway it belongs to" }}
{{- end }}
{{- end }}

{{- define "tidegate.guardMonitors" -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled }}
{{- fail "metrics.serviceMonitor and metrics.podMonitor would scrape every pod twice: enable one of them" }}
{{- end }}
{{- end }}
