{{/* Checks that the schema cannot express: values that are valid separately but not together. Every guard stops the
rendering with what is wrong and what to set instead. */}}

{{- define "tidegate.guards" -}}
{{- include "tidegate.guardNames" . }}
{{- include "tidegate.guardLabels" . }}
{{- include "tidegate.guardTwice" . }}
{{- include "tidegate.guardSecrets" . }}
{{- include "tidegate.guardNetwork" . }}
{{- include "tidegate.guardRedis" . }}
{{- include "tidegate.guardFleet" . }}
{{- include "tidegate.guardTimes" . }}
{{- include "tidegate.guardMonitors" . }}
{{- end }}

{{/* Names that Kubernetes would refuse: a Service's name is an RFC 1035 label, and most names are used in labels. */}}
{{- define "tidegate.guardNames" -}}
{{- $full := include "tidegate.fullname" . }}
{{- $from := .Values.fullnameOverride | empty | ternary (printf "made of the release %q and the chart %q" .Release.Name (include "tidegate.name" .)) "fullnameOverride" }}
{{- $instead := .Values.fullnameOverride | empty | ternary "; set fullnameOverride, or install under another release name" "" }}
{{- if gt (len $full) 52 }}
{{- fail (printf "Kubernetes refuses names of more than 63 characters, and the chart appends up to 11 (-test-ready): %q (%s) has %d, but at most 52 are allowed" $full $from (len $full)) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "Kubernetes refuses %q as the name of a Service (%s): it must begin with a letter, end with a letter or digit, and consist of a-z, 0-9 and -%s" $full $from $instead) }}
{{- end }}
{{- $name := include "tidegate.name" . }}
{{- if or (gt (len $name) 63) (not (regexMatch "^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$" $name)) }}
{{- fail (printf "Kubernetes refuses %q (nameOverride, or the chart's name or alias) as the label app.kubernetes.io/name: it must have at most 63 letters, digits, -, _ and ., and begin and end with a letter or digit" $name) }}
{{- end }}
{{- $space := .Release.Namespace }}
{{- if or (gt (len $space) 63) (not (regexMatch "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" $space)) }}
{{- fail (printf "Kubernetes refuses %q as the name of a namespace: it must have at most 63 characters a-z, 0-9 and -, and begin and end with a letter or digit" $space) }}
{{- end }}
{{- end }}

{{/* The user's labels and annotations override the chart's, except those that the chart depends on. */}}
{{- define "tidegate.guardLabels" -}}
{{- $metrics := .Values.metrics }}
{{- range $where, $labels := dict
  "commonLabels" .Values.commonLabels
  "podLabels" .Values.podLabels
  "metrics.serviceMonitor.labels" $metrics.serviceMonitor.labels
  "metrics.podMonitor.labels" $metrics.podMonitor.labels
  "metrics.prometheusRule.labels" $metrics.prometheusRule.labels
  "metrics.dashboards.labels" $metrics.dashboards.labels
}}
{{- range $key := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" }}
{{- if hasKey ($labels | default dict) $key }}
{{- fail (printf "%s: selectors use the label %s, so only the chart may set it; set nameOverride, or choose another label" $where $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $where, $annotations := dict "commonAnnotations" .Values.commonAnnotations "podAnnotations" .Values.podAnnotations }}
{{- if hasKey ($annotations | default dict) "checksum/config" }}
{{- fail (printf "%s: only the chart may set the annotation checksum/config; it makes a rollout replace the pods when the configuration changes" $where) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Lists whose elements have names: each name may occur once, including the chart's own. */}}
{{- define "tidegate.guardTwice" -}}
{{- $lists := list
  (dict "where" "extraVolumes" "key" "name" "own" (list "config" "secrets" "tls") "given" .Values.extraVolumes)
  (dict "where" "extraVolumeMounts" "key" "mountPath" "own" (list "/etc/tidegate/config" "/etc/tidegate/secrets" "/etc/tidegate/tls") "given" .Values.extraVolumeMounts)
  (dict "where" "extraEnv" "key" "name" "own" list "given" .Values.extraEnv)
  (dict "where" "initContainers and extraContainers" "key" "name" "own" (list "tidegate") "given" (concat .Values.initContainers .Values.extraContainers))
}}
{{- range $list := $lists }}
{{- $seen := dict }}
{{- range $own := $list.own }}{{ $_ := set $seen $own "the chart has one of its own" }}{{ end }}
{{- range $entry := $list.given }}
{{- $name := get $entry $list.key | trimSuffix "/" }}
{{- if hasKey $seen $name }}
{{- fail (printf "%s: %s %s twice: %s" $list.where $list.key $name (get $seen $name)) }}
{{- end }}
{{- $_ := set $seen $name "give each its own" }}
{{- end }}
{{- end }}
{{- end }}

{{/* A NetworkPolicy that blocks connections that the node needs to become ready. */}}
{{- define "tidegate.guardNetwork" -}}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.limitEgress }}
{{- $port := int .Values.networkPolicy.redisPort }}
{{- with regexFind "^rediss?://[^/?#]*" .Values.redis.url }}
{{- $named := regexFind ":[0-9]+$" . | trimPrefix ":" | default "6379" | int }}
{{- if ne $named $port }}
{{- fail (printf "networkPolicy.redisPort is %d, and redis.url is reached at port %d: networkPolicy.limitEgress would cut the nodes off from Redis" $port $named) }}
{{- end }}
{{- end }}
{{- if and .Values.redis.development.enabled (ne $port 6379) }}
{{- fail (printf "networkPolicy.redisPort is %d, and redis.development listens at 6379: networkPolicy.limitEgress would cut the nodes off from Redis" $port) }}
{{- end }}
{{- $keys := get (get .Values.config "auth" | default dict) "jwks_url" | default "" }}
{{- if and $keys (not .Values.networkPolicy.extraEgress) (not (regexMatch "^[a-z]+://(localhost|127\\.|\\[::1\\])" $keys)) }}
{{- fail "config.auth.jwks_url needs a way out: networkPolicy.limitEgress would cut the nodes off from it, and they would not become ready; allow it in networkPolicy.extraEgress" }}
{{- end }}
{{- end }}
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
{{- fail (printf "config.%s: the chart sets this key; use %s" $key $instead) }}
{{- end }}
{{- end }}
{{- if regexMatch "^[^/]*//[^/?#]*@" (get (get $config "auth" | default dict) "jwks_url" | default "") }}
{{- fail "config.auth.jwks_url holds a password; give it by extraEnv, TIDEGATE_AUTH__JWKS_URL with valueFrom" }}
{{- end }}
{{- range $key, $_ := .Values.secretFiles }}
{{- if hasKey $managed $key }}
{{- fail (printf "secretFiles.%s: the chart sets this key; use %s" $key (get $managed $key)) }}
{{- end }}
{{- end }}
{{- range $key, $instead := $managed }}
{{- $variable := printf "TIDEGATE_%s" ($key | replace "." "__" | upper) }}
{{- range $.Values.extraEnv }}
{{- if and (eq (upper .name) $variable) (not (regexMatch "^(broker|auth)\\." $key)) }}
{{- fail (printf "extraEnv: %s would override what the chart sets; use %s" .name $instead) }}
{{- end }}
{{- end }}
{{- end }}
{{- range .Values.extraArgs }}
{{- if regexMatch "^--(config|public-listen|ops-listen)(=|$)" . }}
{{- fail (printf "extraArgs: the chart sets %s; use config, listenAddress or containerPorts" .) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if and (hasKey . "value") (regexMatch "(?i)^TIDEGATE_.*(SECRET|PASSWORD|API_KEYS?|PRIVATE_KEY|BROKER__URL)$" .name) }}
{{- fail (printf "extraEnv: %s holds a secret; take it from a Secret with valueFrom, or mount it with secretFiles" .name) }}
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
{{- /* Schemes that the node of this appVersion does not support; the chart's tests compare the list with the node. */}}
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
{{- fail "more than one pod needs a Redis that all of them use, or clients of different pods would not receive each other's messages: set redis.url, redis.existingSecret or (for trying out) redis.development.enabled" }}
{{- end }}
{{- if not (include "tidegate.commonKey" .) }}
{{- fail "more than one pod needs a common key, or one pod would refuse the tokens of another: set auth.existingSecret" }}
{{- end }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if ne .kind "none" }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %d and autoscaling.maxReplicas is %d" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- $most := get (get $.Values.config "limits" | default dict) "connections" | default 100000 | int }}
{{- if ge (int .connectionsPerPod) $most }}
{{- fail (printf "autoscaling.connectionsPerPod is %d: it must be below limits.connections (%d), or pods are full before new ones are added" (int .connectionsPerPod) $most) }}
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
{{- fail (printf "terminationGracePeriodSeconds is %d, but a pod needs %d to drain: drain.preStopSeconds %d + pauseSeconds %d + windowSeconds %d + flushSeconds %d + marginSeconds %d" $given $needed (int .preStopSeconds) (int .pauseSeconds) (int .windowSeconds) (int .flushSeconds) (int .marginSeconds)) }}
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
