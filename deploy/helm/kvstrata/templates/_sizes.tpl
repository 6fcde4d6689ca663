{{/* Bytes of a size in Redis' units: 80gb. */}}
{{- define "kvstrata.redisBytes" -}}
{{- $text := lower (toString .) -}}
{{- $units := dict "" 1 "b" 1 "k" 1000 "kb" 1024 "m" 1000000 "mb" 1048576 "g" 1000000000 "gb" 1073741824 -}}
{{- mul (regexFind "^[0-9]+" $text | int64) (get $units (regexFind "[a-z]*$" $text) | int64) -}}
{{- end -}}

{{/* Bytes of a quantity of Kubernetes: 80Gi. The schema lets whole numbers through. */}}
{{- define "kvstrata.quantityBytes" -}}
{{- $text := toString . -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mul (regexFind "^[0-9]+" $text | int64) (get $units (regexFind "[a-zA-Z]*$" $text) | int64) -}}
{{- end -}}

{{/* What headroomPercent of limits.memory leaves, in bytes; 0 when there is nothing to keep free. */}}
{{- define "kvstrata.redis.roomBytes" -}}
{{- $limit := dig "limits" "memory" "" .Values.lmcache.resources -}}
{{- if and $limit (gt (int .Values.lmcache.headroomPercent) 0) -}}
{{- div (mul (include "kvstrata.quantityBytes" $limit | int64) (sub 100 (int .Values.lmcache.headroomPercent))) 100 -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{/* The value of Redis' maxmemory: lmcache.maxMemory, unless limits.memory is too small for it. */}}
{{- define "kvstrata.redis.maxmemory" -}}
{{- $asked := include "kvstrata.redisBytes" .Values.lmcache.maxMemory | int64 -}}
{{- $room := include "kvstrata.redis.roomBytes" . | int64 -}}
{{- if and (gt $room 0) (gt $asked $room) -}}
{{- printf "%dmb" (div $room 1048576) -}}
{{- else -}}
{{- .Values.lmcache.maxMemory -}}
{{- end -}}
{{- end -}}

{{/* How much may wait for a replica: half of headroomPercent of limits.memory, at least what Redis has by default. */}}
{{- define "kvstrata.redis.replicaBuffer" -}}
{{- $limit := dig "limits" "memory" "0" .Values.lmcache.resources -}}
{{- $half := div (mul (include "kvstrata.quantityBytes" $limit | int64) (int64 .Values.lmcache.headroomPercent)) 200 -}}
{{- printf "%dmb" (max 256 (div $half 1048576)) -}}
{{- end -}}
