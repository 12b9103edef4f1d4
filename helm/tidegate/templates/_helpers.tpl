{{/* Names, labels, and the few numbers that several objects share. _guards.tpl refuses invalid values. */}}

{{- define "tidegate.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/* At most 52 characters: with the longest suffix, -test-ready, that makes 63. An override is never truncated;
guardNames refuses one that is too long. */}}
{{- define "tidegate.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else }}
{{- $name := include "tidegate.name" . }}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- $full | trunc 52 | regexFind "^.*[^-.]" }}
{{- end }}
{{- end }}

{{/* The labels that selectors use; users cannot override them. Call with a dict of root and, for objects other than the
gateway, component. */}}
{{- define "tidegate.selectorLabels" -}}
{{- dict
  "app.kubernetes.io/name" (include "tidegate.name" .root)
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/component" (.component | default "gateway")
  | toYaml }}
{{- end }}

{{/* Labels of every object: the chart's, then the user's for all objects, then those for this object (labels), then the
selectors' labels; later ones override earlier ones. Call with a dict of root and, where they differ, component and
labels. */}}
{{- define "tidegate.labels" -}}
{{- $chart := .root.Chart -}}
{{- $labels := dict
  "helm.sh/chart" (printf "%s-%s" $chart.Name $chart.Version | replace "+" "_" | trunc 63 | regexFind "^.*[A-Za-z0-9]")
  "app.kubernetes.io/part-of" "tidegate"
  "app.kubernetes.io/version" $chart.AppVersion
  "app.kubernetes.io/managed-by" .root.Release.Service
-}}
{{- $selected := include "tidegate.selectorLabels" . | fromYaml -}}
{{- mergeOverwrite $labels .root.Values.commonLabels (.labels | default dict) $selected | toYaml }}
{{- end }}

{{/* Labels of the gateway's pods. They lack the chart's version: a new chart version alone must not replace the pods and
move every connection. */}}
{{- define "tidegate.podLabels" -}}
{{- $labels := dict "app.kubernetes.io/part-of" "tidegate" "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $selected := include "tidegate.selectorLabels" (dict "root" .) | fromYaml -}}
{{- mergeOverwrite $labels .Values.commonLabels .Values.podLabels $selected | toYaml }}
{{- end }}

{{- define "tidegate.podAnnotations" -}}
{{- $config := .Values.restartOnConfigChange | ternary (include "tidegate.config" .) (include "tidegate.configAtStart" .) -}}
{{- $annotations := dict "kubectl.kubernetes.io/default-container" "tidegate" -}}
{{- $checksum := dict "checksum/config" ($config | sha256sum) -}}
{{- mergeOverwrite $annotations .Values.commonAnnotations .Values.podAnnotations $checksum | toYaml }}
{{- end }}

{{/* name, namespace, labels and annotations. Call with a dict of root and, where they differ from the gateway's, name or
suffix, component, labels, defaults (the chart's annotations) and annotations (the user's). */}}
{{- define "tidegate.metadata" -}}
name: {{ .name | default (printf "%s%s" (include "tidegate.fullname" .root) (.suffix | default "")) | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "tidegate.labels" . | nindent 2 }}
{{- with mergeOverwrite dict (.defaults | default dict) .root.Values.commonAnnotations (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tidegate.serviceAccountName" -}}
{{- if .Values.serviceAccount.name }}
{{- .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create }}
{{- include "tidegate.fullname" . }}
{{- else -}}
default
{{- end }}
{{- end }}

{{- define "tidegate.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* The maximum number of pods outside of a rollout. */}}
{{- define "tidegate.maxPods" -}}
{{- if eq .Values.autoscaling.kind "none" }}{{ .Values.replicaCount }}{{ else }}{{ .Values.autoscaling.maxReplicas }}{{ end }}
{{- end }}

{{/* Whether the cluster supports the sleep action: on by default since Kubernetes 1.30. */}}
{{- define "tidegate.preStopSleep" -}}
{{- if and (gt (int .Values.drain.preStopSeconds) 0) (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version) }}yes{{ end }}
{{- end }}

{{/* The node's drain.pause. */}}
{{- define "tidegate.pauseSeconds" -}}
{{- if include "tidegate.preStopSleep" . }}
{{- int .Values.drain.pauseSeconds }}
{{- else }}
{{- add (int .Values.drain.pauseSeconds) (int .Values.drain.preStopSeconds) }}
{{- end }}
{{- end }}

{{/* The node's drain.deadline. */}}
{{- define "tidegate.deadlineSeconds" -}}
{{- add (include "tidegate.pauseSeconds" . | int) (int .Values.drain.windowSeconds) (int .Values.drain.flushSeconds) }}
{{- end }}

{{/* Seconds from a pod's deletion until the kubelet kills it. */}}
{{- define "tidegate.graceNeeded" -}}
{{- with .Values.drain }}
{{- add (int .preStopSeconds) (int .pauseSeconds) (int .windowSeconds) (int .flushSeconds) (int .marginSeconds) }}
{{- end }}
{{- end }}

{{- define "tidegate.graceSeconds" -}}
{{- .Values.terminationGracePeriodSeconds | int | default (include "tidegate.graceNeeded" . | int) }}
{{- end }}

{{/* Pods are replaced one after the other; each may take the full time to start and to drain its predecessor. */}}
{{- define "tidegate.progressDeadlineSeconds" -}}
{{- if .Values.progressDeadlineSeconds }}
{{- int .Values.progressDeadlineSeconds }}
{{- else }}
{{- $startup := mul (int .Values.startupProbe.periodSeconds) (int .Values.startupProbe.failureThreshold) }}
{{- $one := add $startup (int .Values.minReadySeconds) (include "tidegate.graceSeconds" . | int) }}
{{- max 600 (mul (include "tidegate.maxPods" . | int) $one) }}
{{- end }}
{{- end }}

{{- define "tidegate.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled }}
{{- printf "%s-tls" (include "tidegate.fullname" .) }}
{{- else }}
{{- .Values.tls.existingSecret }}
{{- end }}
{{- end }}

{{/* Secrets that are mounted as files: a map from configuration key to the Secret's name and key. */}}
{{- define "tidegate.secretFiles" -}}
{{- $files := dict }}
{{- with .Values.auth }}{{- if .existingSecret }}
{{- $_ := set $files "auth.hs256_secret_file" (dict "name" .existingSecret "key" .existingSecretKey) }}
{{- end }}{{- end }}
{{- with .Values.redis }}
{{- if .existingSecret }}
{{- $_ := set $files "broker.url_file" (dict "name" .existingSecret "key" .existingSecretKey) }}
{{- end }}
{{- if .caSecret }}
{{- $_ := set $files "broker.ca_file" (dict "name" .caSecret "key" .caSecretKey) }}
{{- end }}
{{- end }}
{{- toYaml (merge $files .Values.secretFiles) }}
{{- end }}

{{/* The URL of Redis, unless it is in a Secret. */}}
{{- define "tidegate.redisUrl" -}}
{{- if .Values.redis.development.enabled }}
{{- printf "redis://%s-redis:6379/0" (include "tidegate.fullname" .) }}
{{- else }}
{{- .Values.redis.url }}
{{- end }}
{{- end }}

{{/* Whether all pods verify tokens with the same key. */}}
{{- define "tidegate.commonKey" -}}
{{- $key := or .Values.auth.existingSecret .Values.extraEnvFrom (pick (get .Values.config "auth" | default dict) "keys" "jwks_file" "jwks_url") }}
{{- range .Values.extraEnv }}
{{- if regexMatch "(?i)^TIDEGATE_AUTH__(HS256_SECRET|KEYS|JWKS_)" .name }}{{ $key = true }}{{ end }}
{{- end }}
{{- range $name, $_ := .Values.secretFiles }}
{{- if and (hasPrefix "auth." $name) (not (hasSuffix "_ca_file" $name)) }}{{ $key = true }}{{ end }}
{{- end }}
{{- if $key }}yes{{ end }}
{{- end }}

{{/* The URL by which clients reach the gateway from outside, as far as the chart knows it; otherwise empty. */}}
{{- define "tidegate.entry" -}}
{{- $annotations := .Values.ingress.annotations }}
{{- if .Values.httpRoute.enabled }}
{{- /* The Gateway decides whether it is https; plain http would be a mistake. */}}
{{- printf "https://%s" (first .Values.httpRoute.hostnames | default "ADDRESS-OF-THE-GATEWAY") }}
{{- else if .Values.ingress.enabled }}
{{- $secure := or .Values.ingress.tls (hasKey $annotations "alb.ingress.kubernetes.io/certificate-arn") (hasKey $annotations "networking.gke.io/managed-certificates") }}
{{- $host := get (first .Values.ingress.hosts | default dict) "host" | default "ADDRESS-OF-THE-INGRESS" }}
{{- printf "%s://%s" (empty $secure | ternary "http" "https") $host }}
{{- else if and (eq .Values.service.type "LoadBalancer") (not (include "tidegate.tlsSecret" .)) }}
{{- printf "http://$ADDRESS%s" (eq (int .Values.service.port) 80 | ternary "" (printf ":%d" (int .Values.service.port))) }}
{{- end }}
{{- end }}
