{{/* Names and labels. */}}
{{- define "kvstrata.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels of an object: (list . "component") */}}
{{- define "kvstrata.labels" -}}
{{- $root := index . 0 -}}
{{ include "kvstrata.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{- define "kvstrata.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "kvstrata.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "kvstrata.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* What the restricted pod security standard wants of a pod, for a user: (user) */}}
{{- define "kvstrata.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "kvstrata.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Whether there is a Redis, whose it is, and how to reach it. */}}
{{- define "kvstrata.redis.hasSentinel" -}}
{{- if ge (int .Values.lmcache.replicas) 3 }}true{{ end -}}
{{- end -}}

{{- define "kvstrata.redis.domain" -}}
{{- printf "lmcache-redis-nodes.%s.svc.%s" .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{/* The pods' host names with a suffix, separated: (list . suffix separator) */}}
{{- define "kvstrata.redis.nodes" -}}
{{- $root := index . 0 -}}
{{- $nodes := list -}}
{{- range $number := until (int $root.Values.lmcache.replicas) -}}
{{- $nodes = append $nodes (printf "lmcache-redis-%d.%s%s" $number (include "kvstrata.redis.domain" $root) (index $ 1)) -}}
{{- end -}}
{{- join (index . 2) $nodes -}}
{{- end -}}

{{- define "kvstrata.redis.secret" -}}
{{- if .Values.externalRedis.url -}}
{{- .Values.externalRedis.existingSecret -}}
{{- else if and .Values.lmcache.enabled .Values.lmcache.auth.enabled -}}
{{- default "lmcache-redis" .Values.lmcache.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "kvstrata.redis.secretKey" -}}
{{- if .Values.externalRedis.url -}}
{{- .Values.externalRedis.existingSecretKey -}}
{{- else if .Values.lmcache.auth.existingSecret -}}
{{- .Values.lmcache.auth.existingSecretKey -}}
{{- else -}}
redis-password
{{- end -}}
{{- end -}}

{{/* The Secret with the CA that clients of the bundled Redis need. */}}
{{- define "kvstrata.redis.tlsSecret" -}}
{{- if and .Values.lmcache.enabled .Values.lmcache.tls.enabled -}}{{ .Values.lmcache.tls.existingSecret }}{{- end -}}
{{- end -}}

{{/* The URL of the shared tier. $(REDIS_PASSWORD) is filled in by Kubernetes, from the pod's environment. */}}
{{- define "kvstrata.remoteUrl" -}}
{{- $lmcache := .Values.lmcache -}}
{{- if .Values.externalRedis.url -}}
{{- .Values.externalRedis.url -}}
{{- else if $lmcache.enabled -}}
{{- $scheme := ternary "rediss" "redis" $lmcache.tls.enabled -}}
{{- $login := ternary ":$(REDIS_PASSWORD)@" "" $lmcache.auth.enabled -}}
{{- $parameters := list -}}
{{- if include "kvstrata.redis.hasSentinel" . -}}
{{- if $lmcache.auth.enabled }}{{ $parameters = append $parameters "sentinel_password=$(REDIS_PASSWORD)" }}{{ end -}}
{{- if $lmcache.tls.enabled }}{{ $parameters = append $parameters "ssl_ca_certs=/etc/kvstrata/redis-tls/ca.crt" }}{{ end -}}
{{- printf "%s-sentinel://%s%s/mymaster" $scheme $login (include "kvstrata.redis.nodes" (list . ":26379" ",")) -}}
{{- else -}}
{{- if $lmcache.tls.enabled }}{{ $parameters = append $parameters "ssl_ca_certs=/etc/kvstrata/redis-tls/ca.crt" }}{{ end -}}
{{- printf "%s://%slmcache-redis.%s.svc.%s:6379" $scheme $login .Release.Namespace .Values.clusterDomain -}}
{{- end -}}
{{- if $parameters }}?{{ join "&" $parameters }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* The password for $(REDIS_PASSWORD), as an item of env. */}}
{{- define "kvstrata.redis.passwordEnv" -}}
{{- with include "kvstrata.redis.secret" . }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ include "kvstrata.redis.secretKey" $ }}
{{- end }}
{{- end -}}

{{/* A value of a Secret that was generated once: (list . name key). Kept over upgrades, base64. */}}
{{- define "kvstrata.kept" -}}
{{- $root := index . 0 -}}
{{- $existing := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- if and $existing (hasKey ($existing.data | default dict) (index . 2)) -}}
{{- index $existing.data (index . 2) -}}
{{- else -}}
{{- randAlphaNum 32 | b64enc -}}
{{- end -}}
{{- end -}}
