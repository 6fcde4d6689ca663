{{/* What the scripts in files/redis are told, as items of env. */}}
{{- define "kvstrata.redis.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: ME
  value: $(POD_NAME).{{ include "kvstrata.redis.domain" . }}
- name: NODES
  value: {{ include "kvstrata.redis.nodes" (list . "" " ") | quote }}
- name: SERVICE
  value: mymaster
- name: REDIS_PORT
  value: "6379"
- name: SENTINEL_PORT
  value: {{ ternary "26379" "" (eq (include "kvstrata.redis.hasSentinel" .) "true") | quote }}
- name: BIND
  value: "* -::*"
- name: LOCAL_HOST
  value: localhost
- name: CONFIG_DIR
  value: /etc/kvstrata
- name: DATA_DIR
  value: /data
- name: RUN_DIR
  value: /run/redis
- name: TLS_DIR
  value: {{ ternary "/etc/kvstrata-tls" "" .Values.lmcache.tls.enabled | quote }}
{{- with include "kvstrata.redis.secret" . }}
- name: REDISCLI_AUTH
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ include "kvstrata.redis.secretKey" $ }}
{{- end }}
{{- end -}}

{{/* What both containers mount: (list . "name of the volume for RUN_DIR") */}}
{{- define "kvstrata.redis.mounts" -}}
- name: config
  mountPath: /etc/kvstrata
  readOnly: true
- name: {{ index . 1 }}
  mountPath: /run/redis
{{- if (index . 0).Values.lmcache.tls.enabled }}
- name: tls
  mountPath: /etc/kvstrata-tls
  readOnly: true
{{- end }}
{{- end -}}
