//! The broker contract, over TCP and over a Unix socket.

use broker_bridge::{
    Broker,
    conformance::Backend,
    metrics::BrokerMetrics,
    redis::{RedisBroker, RedisConfig},
};
use futures_util::future::BoxFuture;
use prometheus::Registry;
use tidegate_tests::redis_server::RedisServer;

use crate::stage::config;

/// A server and the way its nodes reach it.
struct Server {
    _server: RedisServer,
    config: RedisConfig,
}

impl Server {
    async fn start(url: impl Fn(&RedisServer) -> String) -> Self {
        let server = RedisServer::start().await.expect("redis-server starts");
        let config = config(&url(&server)).expect("the harness writes valid URLs");
        Self { _server: server, config }
    }
}

impl Backend for Server {
    fn node(&self) -> BoxFuture<'_, Box<dyn Broker>> {
        Box::pin(async move {
            let metrics = BrokerMetrics::register(&Registry::new()).expect("a fresh registry");
            let broker = RedisBroker::start(self.config.clone(), metrics).expect("a valid configuration");
            broker.status().wait_for(broker_bridge::BrokerStatus::is_up).await.expect("not closed");
            Box::new(broker) as Box<dyn Broker>
        })
    }
}

mod tcp {
    use super::{RedisServer, Server};
    broker_bridge::broker_conformance!(Server::start(RedisServer::url).await);
    broker_bridge::broker_history_conformance!(Server::start(RedisServer::url).await);
}

mod unix {
    use super::{RedisServer, Server};
    broker_bridge::broker_conformance!(Server::start(RedisServer::unix_url).await);
    broker_bridge::broker_history_conformance!(Server::start(RedisServer::unix_url).await);
}

mod with_a_prefix_and_many_connections {
    use super::{RedisServer, Server};

    async fn server() -> Server {
        let mut server = Server::start(RedisServer::unix_url).await;
        server.config.prefix = "prod:".parse().expect("a valid prefix");
        server.config.subscribers = 5;
        server.config.publishers = 3;
        server
    }

    broker_bridge::broker_conformance!(server().await);
    broker_bridge::broker_history_conformance!(server().await);
}
