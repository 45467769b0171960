{{- define "sts-backup-agent.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The release's name, with the chart's unless it is part of it; short enough for a suffix in names of 63. */}}
{{- define "sts-backup-agent.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" }}
{{- else }}
{{- $name := include "sts-backup-agent.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 53 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Cluster-scoped objects carry the namespace: releases in two namespaces may have the same name. */}}
{{- define "sts-backup-agent.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "sts-backup-agent.fullname" .) }}
{{- end }}

{{- define "sts-backup-agent.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sts-backup-agent.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sts-backup-agent.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "sts-backup-agent.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sts-backup-agent.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sts-backup-agent.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name must name an existing ServiceAccount when serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/*
Values as TOML, a dotted key a line. JSON's strings, whole numbers and lists are TOML's too; helm's own toToml
writes whole numbers as 25.0.
*/}}
{{- define "sts-backup-agent.toml" -}}
{{- range $key, $value := .values }}
{{- $key = printf "%s%s" $.prefix $key }}
{{- if kindIs "map" $value }}
{{- include "sts-backup-agent.toml" (dict "prefix" (printf "%s." $key) "values" $value) }}
{{- else }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}
