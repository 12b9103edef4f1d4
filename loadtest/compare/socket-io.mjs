// Socket.IO with its Redis adapter: `join` (room) with an acknowledgement, `m` (room, data) to all its members.
import { createServer } from 'node:http';
import { createAdapter } from '@socket.io/redis-adapter';
import { createClient } from 'redis';
import { Server } from 'socket.io';

const publisher = createClient({ url: process.env.REDIS_URL });
const subscriber = publisher.duplicate();
await Promise.all([publisher.connect(), subscriber.connect()]);

const http = createServer();
const io = new Server(http, {
  adapter: createAdapter(publisher, subscriber),
  transports: ['websocket'],
  serveClient: false,
});

io.on('connection', (socket) => {
  socket.on('join', (room, joined) => {
    socket.join(room);
    joined?.();
  });
  socket.on('m', (room, data) => io.to(room).emit('m', data));
});

http.listen({ host: '127.0.0.1', port: Number(process.env.PORT), backlog: 4096 });
