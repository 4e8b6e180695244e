{{- define "nv-embed.name" -}}
{{- $name := .Values.nameOverride | default .Release.Name -}}
{{- if not (contains "nv-embed" $name) }}{{ $name = printf "%s-nv-embed" $name }}{{ end -}}
{{- /* The longest suffix is "-gateway-embed": a Service's name has at most 63 characters. */ -}}
{{- $name | trunc 49 | trimSuffix "-" -}}
{{- end }}

{{- /* Of one part of a release: server or gateway. These never change, because a Deployment's selector cannot. */ -}}
{{- define "nv-embed.selector" -}}
app.kubernetes.io/name: nv-embed
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "nv-embed.labels" -}}
{{ include "nv-embed.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- /* Each server by its own address: gRPC keeps connections, so behind one address all calls would go to one pod. */ -}}
{{- define "nv-embed.grpc-host" -}}
{{ include "nv-embed.name" . }}-headless.{{ .Release.Namespace }}.svc
{{- end }}

{{- /* What every pod of this chart has in common. */ -}}
{{- define "nv-embed.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false  # a Service called "http" would set HTTP_PORT
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with .Values.runAsUser }}
  runAsUser: {{ . | int64 }}
  runAsGroup: {{ . | int64 }}
  fsGroup: {{ . | int64 }}
  fsGroupChangePolicy: OnRootMismatch  # else each start would walk through all weights
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "nv-embed.container" -}}
image: {{ .Values.image | quote }}
imagePullPolicy: {{ .Values.imagePullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- /* NVIDIA's images ask for all GPUs of a node, also for pods that requested none. */ -}}
{{- define "nv-embed.no-gpu" -}}
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end }}

{{- /* What clients inside the chart trust, and what they show. */ -}}
{{- define "nv-embed.client-tls-volume" -}}
- name: client-tls
  projected:
    sources:
      - secret:
          name: {{ .Values.tls.secret }}
          items:
            - key: ca.crt
              path: ca.crt
      {{- with .Values.tls.clientSecret }}
      - secret:
          name: {{ . }}
          items:
            - key: tls.crt
              path: tls.crt
            - key: tls.key
              path: tls.key
      {{- end }}
{{- end }}
