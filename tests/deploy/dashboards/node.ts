// One node in detail.

import { dashboard, graph, graphs, numbers, stat } from "./panels.js";

const this_ = 'namespace=~"$namespace", pod="$pod"';
const process = `${this_}, job="tidegate"`;
const rate = (metric: string, labels = this_) => `rate(${metric}{${labels}}[$__rate_interval])`;
const quantile = (q: number, metric: string) => `histogram_quantile(${q}, sum by (le) (${rate(`${metric}_bucket`)}))`;
const quantiles = (metric: string): [string, string][] => [
  [quantile(0.5, metric), "p50"],
  [quantile(0.99, metric), "p99"],
  [quantile(1, metric), "worst"],
];

export const node = dashboard(
  "tidegate-node",
  "Tidegate / One node",
  "One node in detail.",
  [
    {
      title: "Now",
      lines: [
        numbers(
          stat(
            "Running since",
            "Start of the process.",
            "dateTimeAsIso",
            `process_start_time_seconds{${process}} * 1000`,
          ),
          stat("Connections", "Open sockets of clients.", "short", `tidegate_sockets{${this_}}`),
          stat(
            "Share of the limit",
            "Open sockets ÷ limits.connections.",
            "percentunit",
            `tidegate_sockets{${this_}} / tidegate_sockets_limit{${this_}}`,
            { from: 0.85 },
          ),
          stat("Rooms", "Rooms with a session on this node.", "short", `tidegate_rooms{${this_}}`),
          stat("Deliveries", "Per second.", "cps", rate("tidegate_deliveries_total")),
          stat(
            "Redis",
            "1 while all connections between this node and Redis work.",
            "short",
            `tidegate_broker_up{${this_}}`,
            { below: 1 },
          ),
          stat("Draining", "1 while the node drains.", "short", `tidegate_draining{${this_}}`, { from: 1 }),
          stat(
            "Memory per connection",
            "Resident memory ÷ open sockets; not meaningful for an idle node.",
            "bytes",
            `process_resident_memory_bytes{${process}} / (tidegate_sockets{${this_}} > 0)`,
          ),
        ),
      ],
    },
    {
      title: "Utilisation and saturation",
      lines: [
        graphs(
          graph("Processor", "Cores in use.", "cores", [[rate("process_cpu_seconds_total", process), "cores"]]),
          graph("Memory", "Resident memory.", "bytes", [[`process_resident_memory_bytes{${process}}`, "resident"]]),
          graph("Descriptors and sockets", "Open files, and the sockets of clients among them.", "short", [
            [`process_open_fds{${process}}`, "open files"],
            [`tidegate_sockets{${this_}}`, "sockets"],
          ]),
          graph("Network", "Bytes per second on clients' sockets.", "Bps", [
            [rate("tidegate_network_bytes_total"), "{{direction}}"],
          ]),
        ),
        graphs(
          graph(
            "Shards behind",
            "How late the regular tick of a shard's loop is.",
            "s",
            quantiles("tidegate_shard_lag_seconds"),
            { logarithmic: true },
          ),
          graph(
            "Held for clients",
            "Memory by consumer; limits.memory bounds the sum. A message that waits for many sessions is in memory once, but counts once per session in the queued bytes.",
            "bytes",
            [
              [`tidegate_memory_held_bytes{${this_}}`, "{{consumer}}"],
              [`sum(tidegate_memory_held_bytes{${this_}})`, "all"],
              [`tidegate_memory_limit_bytes{${this_}}`, "limits.memory"],
              [`tidegate_outbound_bytes{${this_}}`, "queued"],
            ],
          ),
          graph("Waiting for Redis", "Bytes of publications that wait to be sent or acknowledged.", "bytes", [
            [`tidegate_broker_publish_queue_bytes{${this_}}`, "publish queue"],
          ]),
          graph(
            "Dropped inside the node",
            "Publications that did not fit into a shard's inbox, and log lines that were not read fast enough.",
            "cps",
            [
              [rate("tidegate_inbox_overflows_total"), "inbox overflows"],
              [rate("tidegate_log_lines_dropped_total"), "log lines"],
            ],
          ),
        ),
      ],
    },
    {
      title: "Sessions",
      lines: [
        graphs(
          graph(
            "Sessions by protocol",
            "Open sessions.",
            "short",
            [[`tidegate_connections{${this_}}`, "{{protocol}}"]],
            { stacked: true },
          ),
          graph(
            "Opened by protocol",
            "Sessions per second.",
            "cps",
            [[rate("tidegate_connections_opened_total"), "{{protocol}}"]],
            { stacked: true },
          ),
          graph(
            "Ends by reason",
            "Sessions per second.",
            "cps",
            [
              [
                `sum by (reason) (${rate("tidegate_connections_closed_total")}) > 0 or topk(1, sum by (reason) (${rate("tidegate_connections_closed_total")}))`,
                "{{reason}}",
              ],
            ],
            { stacked: true },
          ),
          graph(
            "Handshake duration",
            "From a request's head to a session whose subscriptions are active.",
            "s",
            quantiles("tidegate_handshake_seconds"),
          ),
        ),
      ],
    },
    {
      title: "Messages",
      lines: [
        graphs(
          graph("Messages", "Messages from and to clients, per second.", "cps", [
            [rate("tidegate_messages_total"), "{{direction}}"],
          ]),
          graph("Payload", "Bytes per second, without any framing.", "Bps", [
            [rate("tidegate_payload_bytes_total"), "{{direction}}"],
          ]),
          graph(
            "Fan-out duration",
            "From the arrival of a publication to its last write.",
            "s",
            quantiles("tidegate_fanout_seconds"),
            { logarithmic: true },
          ),
          graph("Refusals", "Requests refused and tokens refused, per second.", "cps", [
            [`sum(${rate("tidegate_refusals_total")})`, "requests"],
            [`sum(${rate("tidegate_auth_failures_total")})`, "tokens"],
          ]),
        ),
      ],
    },
    {
      title: "Configuration and limits",
      lines: [
        numbers(
          stat(
            "Configuration is valid",
            "0 while the most recent configuration is refused: the node would not start with it.",
            "short",
            `tidegate_config_last_reload_successful{${this_}}`,
            { below: 1 },
          ),
          stat(
            "Last valid configuration",
            "When it was read.",
            "dateTimeAsIso",
            `tidegate_config_last_reload_success_timestamp_seconds{${this_}} * 1000`,
          ),
        ),
        graphs(
          graph(
            "Configuration and key reloads",
            "Attempts to load a new configuration, and new key files, per second.",
            "cps",
            [
              [`sum by (result) (${rate("tidegate_config_reloads_total")})`, "configuration {{result}}"],
              [`sum by (result) (${rate("tidegate_key_reloads_total")})`, "keys {{result}}"],
            ],
          ),
          graph(
            "Accepting connections",
            "Times that new connections had to wait for limits.accepts, and sockets closed without an answer, per second.",
            "cps",
            [
              [rate("tidegate_accept_pauses_total"), "pauses"],
              [`sum(${rate("tidegate_sockets_dropped_total")})`, "dropped"],
            ],
          ),
          graph(
            "Waiting for cryptography",
            "Steps of TLS handshakes and verifications of tokens that wait for a thread. It stays low while the node has processor time left beside its established sessions.",
            "short",
            [[`tidegate_crypto_waiting{${this_}}`, "{{work}}"]],
          ),
          graph(
            "Cryptography",
            "Steps of TLS handshakes and verifications of tokens that were done or given up, per second.",
            "cps",
            [[rate("tidegate_crypto_wait_seconds_count"), "{{work}}"]],
          ),
          graph("Accounts of limits", "Addresses and users that have used part of a limit.", "short", [
            [`tidegate_limit_accounts{${this_}}`, "accounts"],
          ]),
        ),
      ],
    },
  ],
  true,
);
